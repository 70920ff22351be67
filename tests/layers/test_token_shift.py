"""Lags against a loop over tokens that keeps a list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.core.types import context
from lm.layers.conv import CausalConv
from lm.layers.token_shift import lags, shift

COMPILED = jax.jit(lags)


def by_hand(x, history, reset, present, n):
    """[n, B, T, D] of the tokens before, and the history after, token by token."""
    B, T, D = x.shape
    out, after = np.zeros((n, B, T, D)), np.zeros((B, n, D))
    for b in range(B):
        seen = [row for row in history[b]]
        for t in range(T):
            if reset[b, t]:
                seen = [np.zeros(D)] * n
            for lag in range(n):
                out[lag, b, t] = seen[-1 - lag]
            if present[b, t]:
                seen.append(x[b, t])
        after[b] = seen[-n:]
    return out, after


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10 ** 6), st.sampled_from([1, 7]), st.sampled_from([1, 3]),
       st.sampled_from(["any", "right", "none"]))
def test_lags_are_the_present_tokens_before(seed, T, n, padding):
    rng = np.random.default_rng(seed)
    B, D = 3, 2
    x, history = rng.normal(size=(B, T, D)), rng.normal(size=(B, n, D))
    reset = rng.random((B, T)) < 0.3
    present = {"any": rng.random((B, T)) < 0.6, "none": np.ones((B, T), bool),
               "right": np.arange(T) < rng.integers(0, T + 1, (B, 1))}[padding]
    ctx = context(B, T)._replace(reset=jnp.asarray(reset), weights=jnp.asarray(present))
    outs, after = COMPILED(jnp.asarray(x, jnp.float32), jnp.asarray(history, jnp.float32), ctx)
    want, want_after = by_hand(x, history, reset, present, n)
    for out, expected in zip(outs, want, strict=True):
        np.testing.assert_allclose(np.where(present[..., None], out, 0), np.where(present[..., None], expected, 0),
                                   rtol=1e-6)
    np.testing.assert_allclose(after, want_after, rtol=1e-6)


def test_gradients_reach_the_tokens_before():
    ctx = context(1, 4)
    weights = jnp.arange(1.0, 5)[None, :, None]
    g = jax.grad(lambda x: jnp.sum(weights * shift(x, jnp.zeros((1, 1)), ctx)[0]))(jnp.ones((1, 4, 1)))
    np.testing.assert_array_equal(g[0, :, 0], [2, 3, 4, 0])


@pytest.mark.parametrize("width", [2, 4])
def test_convolution_is_numpys(width):
    x = np.random.default_rng(0).normal(size=(1, 9, 3)).astype(np.float32)
    conv, ctx = CausalConv(width), context(1, 9)
    history = jnp.zeros((1, width - 1, 3))
    params = conv.init(jax.random.key(0), jnp.asarray(x), history, ctx)
    taps = np.asarray(params["params"]["taps"].value)
    got, after = conv.apply(params, jnp.asarray(x), history, ctx)
    for d in range(3):
        np.testing.assert_allclose(got[0, :, d], np.convolve(x[0, :, d], taps[:, d])[:9], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after, x[:, -(width - 1):])
