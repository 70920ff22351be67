"""The interleave of a mixture."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data.mixture import choose, proportions


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(1, 300))
def test_rows_are_counted_evenly_and_without_gaps(rates, n):
    shares = proportions(rates)
    seen = [0] * len(rates)
    for k in range(n):
        source, index = choose(k, shares)
        assert index == seen[source]
        seen[source] += 1
    for count, share in zip(seen, shares, strict=True):
        assert abs(count - n * share / sum(shares)) <= len(rates)


@given(st.integers(2, 5).flatmap(lambda n: st.lists(st.integers(1, 50), min_size=n, max_size=n)))
def test_sizes_as_shares_visit_everything_once(sizes):
    places = [choose(k, sizes) for k in range(sum(sizes))]
    assert sorted(places) == [(source, i) for source, size in enumerate(sizes) for i in range(size)]


def test_it_is_the_interleave_of_grain():
    import grain
    sizes = (300, 100, 200)
    mixed = grain.MapDataset.mix([grain.MapDataset.range(10**6 * i, 10**6 * i + 10**5) for i in range(3)],
                                 [3.0, 1.0, 2.0])
    want = [divmod(mixed[k], 10**6) for k in range(500)]
    assert [choose(k, sizes) for k in range(500)] == want


def test_far_rows_need_no_walk():
    source, index = choose(10**15, proportions([1, 2]))
    assert source in (0, 1) and index == pytest.approx(10**15 / 3 * (source + 1), rel=1e-9)
