"""What the tests of wkv6 and wkv7 have in common: gradients of all inputs, exactness and memory of the chunked form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_gradients(op, implementation, x, reset=None):
    """(outputs, gradients by input name) for cotangents drawn at random."""
    out, pull = jax.vjp(lambda x: op(**x, reset=reset, implementation=implementation), x)
    rng = np.random.default_rng(1)
    return out, pull(tuple(jnp.asarray(rng.normal(size=o.shape), o.dtype) for o in out))[0]


def assert_chunked_is_exact(op, x, tolerance):
    """float32 values and gradients against the float64 reference."""
    x = {name: np.float32(a) for name, a in x.items()}
    got = with_gradients(op, "chunked", x)
    with jax.enable_x64(True):
        want = with_gradients(op, "reference", {name: jnp.asarray(a, jnp.float64) for name, a in x.items()})
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, e, rtol=0, atol=tolerance * max(1, np.abs(e).max()))


def with_extreme_decays(x, log_decay):
    """x with this decay everywhere, or "mixed": one that forgets all and one that forgets nothing in turn."""
    mixed = np.where(np.random.default_rng(1).random(x["w"].shape) < 0.3, -1e5, -1e-4)
    return x | {"w": mixed if log_decay == "mixed" else np.full_like(mixed, log_decay)}


def gradient_temporaries(op, drawn, time):
    """Bytes of temporaries that the gradient of the chunked form needs at this length."""
    x = {name: jax.ShapeDtypeStruct(a.shape, jnp.float32)
         for name, a in drawn(np.random.default_rng(0), 1, time, 1, 16, 16).items()}
    loss = lambda x: (op(**x, implementation="chunked")[0] ** 2).sum()
    return jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis().temp_size_in_bytes
