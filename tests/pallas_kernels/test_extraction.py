"""The k largest scores with tokens side by side, against jax.lax.top_k row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.product_key_topk import extraction

largest = functools.partial(jax.jit, static_argnums=1)(extraction.largest)


def by_rows(scores, k):
    return [np.swapaxes(x, 1, 2) for x in jax.lax.top_k(jnp.swapaxes(scores, 1, 2), k)]


@pytest.mark.parametrize("shape,k", [((2, 7, 3), 3), ((1, 1, 1), 1), ((3, 50, 5), 16), ((1, 1100, 2), 4)])
def test_it_equals_top_k(shape, k):
    """Sizes below, off and above the scores of one loop; many equal ones, which go by place."""
    scores = jnp.asarray(np.random.default_rng(0).integers(-3, 4, shape), jnp.float32)
    for got, want in zip(largest(scores, k), by_rows(scores, k), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype


def test_zeros_infinities_and_nan_are_where_top_k_has_them():
    scores = jnp.asarray([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, 1e-45, -1.0, 0.0])[None, :, None]
    for got, want in zip(largest(scores, 8), by_rows(scores, 8), strict=True):
        np.testing.assert_array_equal(got, want)
