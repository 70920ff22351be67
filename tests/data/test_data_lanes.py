"""Each row of a batch goes on where it ended in the batch before."""

import numpy as np
import pytest

from lm.data.lanes import Lanes
from lm.data.loader import build_dataset

TEXTS = tuple("".join(chr(97 + (i * 7 + j * j) % 26) for j in range(2 + (i * 37) % 90)) for i in range(60))


def dataset(batch_size=3, seq_len=16, **fields):
    data = dict(source="memory", texts=TEXTS, validation_fraction=0, packing="lanes") | fields
    return build_dataset(data, split="train", seed=1, batch_size=batch_size, seq_len=seq_len)


def test_lanes_are_the_text_cut_in_as_many_parts_as_rows():
    made = dataset(shuffle=False)
    inputs = "".join(TEXTS).encode()
    targets = b"".join(text.encode()[1:] + b"\0" for text in TEXTS)     # nothing is predicted from the last one
    windows = len(inputs) // 16 // 3
    steps = [made.batch(step) for step in range(windows)]
    for lane in range(3):
        part = slice(lane * windows * 16, (lane + 1) * windows * 16)
        assert bytes(np.concatenate([b.tokens[lane] for b in steps]).astype(np.uint8)) == inputs[part]
        assert bytes(np.concatenate([b.targets[lane] for b in steps]).astype(np.uint8)) == targets[part]
        positions = np.concatenate([b.positions[lane] for b in steps])
        # Counted on from the row before, from 0 where a document or the lane starts.
        starts = np.cumsum([0, *map(len, TEXTS)])
        want, count = [], 0
        for at in range(part.start, part.stop):
            count = 0 if at in starts or at == part.start else count + 1
            want.append(count)
        np.testing.assert_array_equal(positions, want)
    assert made.num_rows_per_epoch == 3 * windows and made.packing_efficiency == 1
    assert all((b.weights == (b.targets != 0)).all() and (b.segment_ids > 0).all() for b in steps)


def test_a_new_epoch_starts_afresh_and_in_another_order():
    made = dataset()
    windows = made.num_rows_per_epoch // 3
    first, second = made.batch(0), made.batch(windows)
    assert (first.positions[:, 0] == 0).all() and (second.positions[:, 0] == 0).all()
    assert (first.tokens != second.tokens).any()


def test_hosts_share_the_lanes():
    made = dataset(batch_size=4)
    whole, parts = made.batch(5), [made.batch(5, p, 2) for p in range(2)]
    for field, a, b in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(field, np.concatenate([a, b]))


def test_what_cannot_be_cut_into_lanes_is_refused():
    with pytest.raises(ValueError, match=r"48 rows of a batch: 4800 tokens, and there are \d+; lower train.batch_size"):
        Lanes(4000, seq_len=100, batch_size=48)
    with pytest.raises(ValueError, match="takes one source and no packing_window"):
        dataset(packing_window=3)


def test_evaluation_rows_start_fresh():
    data = dict(source="memory", texts=TEXTS, packing="lanes", validation_fraction=0.3)
    made = build_dataset(data, split="validation", seed=1, batch_size=3, seq_len=16)
    assert all((batch.positions[:, 0] == 0).all() for batch in made.eval_batches())
