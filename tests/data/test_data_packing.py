"""Plans of rows: every input once, from lengths alone, the same in any order of asking."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.packing import PACKINGS, Concat, FirstFit, RowOrder, Single, first_fit

lengths_of = st.lists(st.integers(1, 40), min_size=1, max_size=60)
packings = st.sampled_from(sorted(PACKINGS))


def rows_of(plan, epoch):
    return [plan.pieces(epoch, row) for row in range(plan.num_rows)]


@settings(deadline=None, max_examples=150)
@given(lengths_of, st.integers(1, 16), packings, st.integers(0, 5), st.one_of(st.none(), st.integers(1, 7)),
       st.booleans(), st.integers(0, 3))
def test_every_input_is_in_exactly_one_row_of_an_epoch(lengths, seq_len, packing, seed, window, shuffle, epoch):
    plan = PACKINGS[packing](np.array(lengths), seq_len, key=seed, window=window, shuffle=shuffle)
    seen = [np.zeros(n, int) for n in lengths]
    for document, start, length, position in rows_of(plan, epoch):
        assert not position.any()
        assert len(document) > 0 and length.min() > 0 and 0 < length.sum() <= seq_len
        for d, s, n in zip(document, start, length, strict=True):
            seen[d][s:s + n] += 1
            assert s + n <= lengths[d]
    assert all((counts == 1).all() for counts in seen)


@settings(deadline=None, max_examples=100)
@given(lengths_of, st.integers(1, 16), st.integers(0, 5), st.one_of(st.none(), st.integers(1, 7)))
def test_first_fit_keeps_documents_up_to_seq_len_whole_and_cuts_others_at_multiples(lengths, seq_len, seed, window):
    plan = FirstFit(np.array(lengths), seq_len, key=seed, window=window, shuffle=True)
    for document, start, length, _ in rows_of(plan, 0):
        assert (start % seq_len == 0).all()
        assert ((length == seq_len) | (start + length == np.array(lengths)[document])).all()


@settings(deadline=None, max_examples=100)
@given(lengths_of, st.integers(1, 16), st.integers(0, 5))
def test_concat_pads_at_most_the_last_row(lengths, seq_len, seed):
    plan = Concat(np.array(lengths), seq_len, key=seed, window=3, shuffle=True)
    filled = [int(p.length.sum()) for p in rows_of(plan, 1)]
    assert all(n == seq_len for n in filled[:-1]) and sum(filled) == sum(lengths)


@settings(deadline=None, max_examples=100)
@given(lengths_of, st.integers(1, 16), st.integers(0, 5))
def test_single_has_one_document_a_row_in_the_fewest_rows(lengths, seq_len, seed):
    plan = Single(np.array(lengths), seq_len, key=seed, window=None, shuffle=True)
    rows = rows_of(plan, 0)
    assert all(len(p.document) == 1 and p.start[0] % seq_len == 0 for p in rows)
    assert len(rows) == sum(-(-n // seq_len) for n in lengths)


def loop_first_fit(lengths, seq_len):
    """First-fit decreasing as in a textbook."""
    rows = []
    placed = {}
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[item]:
            row = next((r for r, used in enumerate(rows) if used + lengths[item] <= seq_len), len(rows))
            if row == len(rows):
                rows.append(0)
            placed[item] = (row, rows[row])
            rows[row] += lengths[item]
    return placed, len(rows)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(st.integers(0, 15), min_size=12, max_size=12), min_size=1, max_size=4))
def test_packing_of_many_windows_at_once_equals_a_loop(windows):
    row, start, count = first_fit(np.array(windows), 16)
    for g, lengths in enumerate(windows):
        placed, rows = loop_first_fit(lengths, 16)
        assert count[g] == rows
        assert all((row[g, i], start[g, i]) == where for i, where in placed.items())


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 4), st.integers(0, 3))
def test_an_epoch_visits_every_row_once_and_epochs_differ_in_order(sizes, key, epoch):
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    order = RowOrder(bounds, key=key, shuffle=True)
    n = int(bounds[-1])
    visited = [order(epoch * n + i) for i in range(n)]
    assert {e for e, _ in visited} == {epoch}
    assert sorted(row for _, row in visited) == list(range(n))
    if n > 20:
        assert [row for _, row in visited] != [order((epoch + 1) * n + i)[1] for i in range(n)]


def test_rows_are_the_same_whatever_was_asked_before():
    lengths = np.random.default_rng(0).integers(1, 50, 400)
    for packing in PACKINGS.values():
        once = packing(lengths, 32, key=7, window=16, shuffle=True)
        order = RowOrder(once.row_bounds, key=7, shuffle=True)
        sequential = [once.pieces(*order(i)) for i in range(3 * once.num_rows)]
        for i in np.random.default_rng(1).permutation(3 * once.num_rows)[:200]:
            fresh = packing(lengths, 32, key=7, window=16, shuffle=True)
            for a, b in zip(fresh.pieces(*RowOrder(fresh.row_bounds, key=7, shuffle=True)(i)), sequential[i],
                            strict=True):
                np.testing.assert_array_equal(a, b)


def test_first_fit_leaves_little_padding_on_ordinary_lengths():
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(6, 1, 5000)).astype(np.int64)
    plan = FirstFit(lengths, 1024, key=0, window=None, shuffle=True)
    assert lengths.sum() / (plan.num_rows * 1024) > 0.99


@pytest.mark.parametrize("packing", sorted(PACKINGS))
def test_without_shuffling_documents_keep_their_order(packing):
    plan = PACKINGS[packing](np.array([16, 16, 16]), 8, key=3, window=None, shuffle=False)
    order = RowOrder(plan.row_bounds, key=3, shuffle=False)
    found = [plan.pieces(*order(i)) for i in range(6)]
    assert [(int(p.document[0]), int(p.start[0])) for p in found] == [(d, s) for d in range(3) for s in (0, 8)]
