"""What the TPU kernels of wkv6 and wkv7 keep of bfloat16 inputs, heads of 64 side by side."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.testing import interpreted_tpu
from pallas_kernels.wkv6 import wkv6
from pallas_kernels.wkv7 import wkv7

NARROW = ("r", "k", "v", "a", "b")


def drawn(op, rng, time, heads=2, strongest=4.5):
    shape = (1, time, heads, 64)
    kappa = rng.normal(size=shape)
    kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    x = {name: rng.normal(size=shape) for name in "rkv"} | dict(state=rng.normal(size=(1, heads, 64, 64)))
    x["w"] = -np.exp(rng.uniform(-9, strongest, shape))
    return x | (dict(u=rng.normal(size=(heads, 64))) if op is wkv6 else dict(a=-kappa, b=kappa * rng.random(shape)))


def rounded(x):
    return {name: jnp.asarray(a, jnp.bfloat16 if name in NARROW else jnp.float32) for name, a in x.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_gradients(op, implementation, x, reset, cotangents):
    out, pull = jax.vjp(lambda x: op(**x, reset=reset, implementation=implementation), x)
    return out, pull(tuple(g.astype(o.dtype) for g, o in zip(cotangents, out, strict=True)))[0]


@pytest.mark.slow
@pytest.mark.parametrize("op", [wkv6, wkv7], ids=["wkv6", "wkv7"])
@pytest.mark.parametrize("strongest", [-2.0, 4.5])
def test_the_error_is_that_of_rounded_inputs(op, strongest):
    """What products in bfloat16 add is no more than twice what it costs that the inputs are bfloat16 (root mean
    squares, float64 reference), for outputs, state and all gradients; the output's own rounding besides."""
    rng = np.random.default_rng(0)
    x, reset = drawn(op, rng, 192, strongest=strongest), rng.random((1, 192)) < 0.02
    cotangents = tuple(np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), np.float64)
                       for shape in ((1, 192, 2, 64), (1, 2, 64, 64)))
    with interpreted_tpu():
        got = jax.block_until_ready(with_gradients(op, "pallas_tpu", rounded(x), reset, cotangents))
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(a, np.float64)) for name, a in rounded(x).items()}
        want, other = (with_gradients(op, "reference", x, reset, cotangents) for x in (wide, x))
    for path, g in jax.tree.leaves_with_path(got):
        e, o = (np.asarray(dict(jax.tree.leaves_with_path(tree))[path]) for tree in (want, other))
        size = lambda x: np.sqrt((x ** 2).mean())
        error, allowed = size(np.asarray(g, np.float64) - e), 2 * size(o - e) + 2.0 ** -9 * size(e)
        assert error <= allowed, f"{jax.tree_util.keystr(path)}: {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("op", [pytest.param(wkv6, marks=pytest.mark.slow), wkv7], ids=["wkv6", "wkv7"])
def test_nothing_passes_a_reset_or_what_a_strong_decay_forgets(op):
    """v of 1e20 before a reset changes no bit after it, whatever its place in a chunk; and the state after a decay of
    exp(-1e4) in all channels keeps 1e-6 of the past at most."""
    rng = np.random.default_rng(0)
    x, reset = rounded(drawn(op, rng, 128, strongest=-3)), np.zeros((1, 128), bool)
    reset[0, 77] = True
    run = jax.jit(lambda x, reset: op(**x, reset=reset, implementation="pallas_tpu"))
    with interpreted_tpu():
        clean = jax.block_until_ready(run(x, reset))
        poisoned = jax.block_until_ready(run(x | {"v": x["v"].at[:, :77].set(1e20)}, reset))
        forgets = x | {"w": x["w"].at[:, 99].set(-1e4), "v": x["v"].at[:, 100:].set(0)}
        if op is wkv7:
            forgets["b"] = x["b"].at[:, 99:].set(0)
        after = jax.block_until_ready(run(forgets | {"v": forgets["v"].at[:, 99].set(0)}, reset))
    np.testing.assert_array_equal(clean[0][:, 77:], poisoned[0][:, 77:])
    np.testing.assert_array_equal(clean[1], poisoned[1])
    assert np.abs(after[1]).max() <= 1e-6
