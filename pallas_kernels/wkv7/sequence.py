"""`wkv7` where time is split over devices. B batch, T time of one device, H heads, K key size, V value size."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.sequence import Element, exchange
from pallas_kernels.wkv7.api import wkv7

Array = jax.Array
product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def wkv7_over_sequence(r: Array, w: Array, k: Array, v: Array, a: Array, b: Array, state: Array | None = None,
                       reset: Array | None = None, *, axis_name: str,
                       implementation: str | tuple[str, ...] | None = None) -> tuple[Array, Array]:
    """`wkv7` inside `jax.shard_map`, T cut along mesh axis `axis_name` in order, the state the same on its devices.

    y is this device's part; the state returned is the one after all of time, the same on all devices.

    A stretch multiplies the state by a matrix [K, K]. The operation itself gives it: it is what becomes of the identity
    as state when nothing is written. The outputs of that run, on the way, are what y reads of any other state. So there
    are two runs a device, and none waits for the exchange.
    """
    wide = jnp.promote_types(r.dtype, jnp.float32)
    batch, _, heads, keys = r.shape
    run = functools.partial(wkv7, reset=reset, implementation=implementation)
    own, written = run(r, w, k, v, a, b)
    identity = jnp.broadcast_to(jnp.eye(keys, dtype=wide), (batch, heads, keys, keys))
    reads, passed = run(r, w, jnp.zeros_like(k), jnp.zeros_like(r), a, b, identity)
    state = jnp.zeros_like(written) if state is None else state.astype(wide)
    before, last = exchange((passed, written), (identity, state), combine, axis_name)
    past = jnp.einsum("bthk,bhkv->bthv", reads.astype(wide), before[1], precision="highest")
    return (own + past).astype(own.dtype), last[1]


def combine(first: Element, second: Element) -> Element:
    """Elements (A, B) of S -> A S + B."""
    return product(second[0], first[0]), product(second[0], first[1]) + second[1]
