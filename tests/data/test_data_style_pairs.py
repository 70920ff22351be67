"""Made pairs: documents with their numbers, the same prompt, styles and lengths as asked for."""

import numpy as np
import pytest

from lm.data.loader import build_dataset

TASK = dict(num_contents=4, num_symbols=20, stop=0.1, rejected_stop=0.4, mismatched=True)


def test_rows_hold_a_pair_and_the_same_response_behind_another_prompt():
    batch = build_dataset(dict(source="style_pairs", task=TASK), batch_size=64, seq_len=50).batch(3)
    good, counts = {1: [], 2: []}, {1: [], 2: []}
    for row in range(64):
        streams = {}
        for number in (1, 2, 3):
            inside = np.flatnonzero(batch.segment_ids[row] == number)
            np.testing.assert_array_equal(batch.positions[row, inside], np.arange(len(inside)))
            np.testing.assert_array_equal(batch.targets[row, inside[:-1]], batch.tokens[row, inside[1:]])
            stream = np.append(batch.tokens[row, inside], batch.targets[row, inside[-1]])
            np.testing.assert_array_equal(batch.weights[row, inside], np.arange(len(inside)) >= 7)
            streams[number] = (stream[:8], stream[8:])
            assert stream[-1] == 3 and (stream[1:8:2] == 0).all()
        prompt = streams[1][0]
        np.testing.assert_array_equal(prompt, streams[2][0])
        np.testing.assert_array_equal(streams[1][1], streams[3][1])
        assert (prompt != streams[3][0]).any()
        for number in (1, 2):
            response = streams[number][1][:-1]
            np.testing.assert_array_equal(response[::2], prompt[::2][:len(response) // 2])
            good[number] += list(response[1::2] == 1)
            counts[number].append(len(response) // 2)
        padding = batch.segment_ids[row] == 0
        assert not batch.weights[row, padding].any()
    assert np.mean(good[1]) == pytest.approx(0.8, abs=0.08) and np.mean(good[2]) == pytest.approx(0.2, abs=0.08)
    assert np.mean(counts[1]) > np.mean(counts[2]) + 0.3 and min(counts[1]) >= 2


def test_a_pair_that_does_not_fit_a_row_is_refused():
    with pytest.raises(ValueError, match="at least 48"):
        build_dataset(dict(source="style_pairs", task=TASK), batch_size=1, seq_len=47)
