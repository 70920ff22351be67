"""The k largest scores and sums on CPUs, against jax.lax.top_k."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.product_key_topk import extraction
from pallas_kernels.product_key_topk.chunked import staircase

largest = functools.partial(jax.jit, static_argnums=1)(extraction.largest)
GROUP = extraction.GROUP


def bits_equal(got, want):
    """Values bit by bit, so that NaN and the sign of 0 count, and places."""
    np.testing.assert_array_equal(np.asarray(got[0]).view(np.int32), np.asarray(want[0]).view(np.int32))
    np.testing.assert_array_equal(got[1], want[1])
    assert [x.dtype for x in got] == [x.dtype for x in want]


@pytest.mark.parametrize("rows,size,k", [(3, 7, 3), (1, 1, 1), (5, 50, 16), (2, 1100, 4), (9, GROUP, GROUP),
                                         (4, 4 * GROUP, 31), (1, GROUP + 1, 2)])
def test_it_equals_top_k(rows, size, k):
    """Sizes below, off and at groups; many equal scores, which go by place within a group and between groups."""
    scores = jnp.asarray(np.random.default_rng(0).integers(-3, 4, (rows, size)), jnp.float32)
    bits_equal(largest(scores, k), jax.lax.top_k(scores, k))


@pytest.mark.parametrize("best", ["one group", "one of each group"])
def test_all_of_a_group_or_one_of_each(best):
    k, scores = 16, np.random.default_rng(0).normal(size=(6, 16 * GROUP)).astype(np.float32)
    scores[:, GROUP:GROUP + k] += 9 * (best == "one group")
    scores[:, ::GROUP] += 9 * (best != "one group")
    bits_equal(largest(scores, k), jax.lax.top_k(jnp.asarray(scores), k))


@pytest.mark.parametrize("fill", [0.0, -np.inf, np.inf, -np.nan])
def test_zeros_infinities_and_nan_are_where_top_k_has_them(fill):
    """In two groups, of which the second is not full: what fills it up is behind every score."""
    scores = np.full(GROUP + 9, fill, np.float32)
    scores[[1, 2, 4, 5, 7, GROUP - 1, GROUP + 2, GROUP + 8]] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -np.nan, -1]
    scores[GROUP] = np.int32(-1).view(np.float32)
    bits_equal(largest(scores[None], 32), jax.lax.top_k(jnp.asarray(scores)[None], 32))


@pytest.mark.parametrize("k", [1, 2, 5, 16, 31])
@pytest.mark.parametrize("kind", ["ties", "infinities"])
def test_sums_are_those_of_the_staircase(k, kind):
    """Also where inf - inf makes sums that do not fall along a row."""
    rng = np.random.default_rng(k)
    first, second = (-np.sort(-rng.integers(-2, 3, (7, k)).astype(np.float32), axis=1) for _ in range(2))
    if kind == "infinities":
        first[0, 0], second[1, 0], first[2:, k // 2:], second[2:, 0] = np.inf, np.inf, -np.inf, np.inf
        second[3:, k // 2:] = -np.inf
    a, b = staircase(k)
    values, places = jax.lax.top_k(jnp.asarray(first)[:, a] + second[:, b], k)
    bits_equal(jax.jit(extraction.largest_sums)(first, second), (values, jnp.asarray(a * k + b)[places]))
