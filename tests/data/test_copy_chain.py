"""Copies of copies: following the distances by hand gives the targets, in as many hops as the set's name says."""

import numpy as np
import pytest

from lm.data.loader import build_dataset


def dataset(seq_len=23, **task):
    return build_dataset(dict(source="copy_chain", task=dict(width=4, num_values=6, report=(1, 4), **task)),
                         split="validation", batch_size=16, seq_len=seq_len)


def test_following_the_distances_gives_the_targets():
    data = dataset()
    batch = data.batch(0)
    slices = {name: part.batch(0).weights for name, part in data.slices().items()}
    for row in range(16):
        tokens, seen = batch.tokens[row], set()
        assert len(set(tokens[:4])) == 4 and tokens[:4].max() < 6
        for t in range(4, 20):
            at, hops = t, 0
            while tokens[at] >= 6:
                at, hops = at - (tokens[at] - 5), hops + 1
            assert at < 4 and hops == t // 4
            assert batch.targets[row, t] == tokens[at] and batch.weights[row, t] == 1
            assert (slices["hops_1"][row, t] == 1) == (hops == 1) and (slices["hops_4"][row, t] == 1) == (hops == 4)
            seen.add(tokens[t])
        assert not batch.weights[row, :4].any() and not batch.present[row, 20:].any()
    # Every value is in every block: none is more frequent than another.
    assert (np.sort(batch.targets[:, 4:20].reshape(16, 4, 4)) == np.sort(batch.tokens[:, None, :4])).all()


@pytest.mark.parametrize("task, words", [
    (dict(width=9), "num_values=6 is less than width=9"), (dict(width=0), "width=0"), (dict(report=(0,)), "from 1"),
    (dict(report=(6,)), "train.seq_len of at least 28; got 23")], ids=str)
def test_tasks_that_cannot_be_are_named(task, words):
    with pytest.raises(ValueError, match=words):
        build_dataset(dict(source="copy_chain", task=dict(dict(width=4, num_values=6), **task)), split="train",
                      batch_size=2, seq_len=23)
