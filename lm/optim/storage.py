"""Moments kept in bfloat16 between steps, rounded to the nearest or at random without bias."""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.optim.state_sharding import map_owned


def random_bits(shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    """16 random bits for every element, as uint32: a hash of the element's index and of one word drawn with `key`.

    Rounding needs no cryptographic generator, and JAX's default one would take ten times as long as AdamW's whole
    update on a CPU. A hash of the index is also the same on every mesh, and each device computes its part alone.
    The finalizer is `lowbias32` of Wellons 2018 (nullprogram.com/blog/2018/07/31).
    """
    index = jnp.zeros(shape, jnp.uint32)
    for dim, size in enumerate(shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
    x = index ^ jax.random.bits(key, (), jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x >> 16


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 `x` as bfloat16, up or down with the probabilities that make the expected value `x` itself.

    The bits that bfloat16 drops, plus as many uniform random bits, carry into those that it keeps. Infinities and NaN
    pass unchanged.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + random_bits(x.shape, key)
    kept = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), kept, x).astype(jnp.bfloat16)


class StoredState(NamedTuple):
    """count: updates so far, from which the random bits are derived. inner: the state, its moments in bfloat16."""

    count: jax.Array
    inner: Any


def store_in_bfloat16(tx: optax.GradientTransformation, *, stochastic: bool) -> optax.GradientTransformation:
    """`tx` with those arrays of its state that have a parameter's shape stored in bfloat16 and used in float32.

    Rounded to nearest, a moment stops moving once its change is below 1/256 of it, which second moments with
    b2 = 0.999 always are; `stochastic` rounding keeps their mean right. Random bits depend on the count and on the
    name of the array only: a run that is repeated or resumed gets the same. Row and column statistics of factored
    moments, which are small, stay as they are.
    """

    def stored(state, params, key=None):
        def one(name, leaf, param=None):
            if param is None or param.shape != leaf.shape or not jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf
            if key is None:
                return leaf.astype(jnp.bfloat16)
            return round_stochastically(leaf.astype(jnp.float32), jax.random.fold_in(key, zlib.crc32(name.encode())))
        return map_owned(one, state, params)

    def init(params):
        return StoredState(jnp.zeros([], jnp.int32), stored(tx.init(params), params))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("store_in_bfloat16 needs the parameters in update(updates, state, params)")
        full = jax.tree.map(lambda s: s.astype(jnp.float32) if s.dtype == jnp.bfloat16 else s, state.inner)
        updates, new = tx.update(updates, full, params)
        key = jax.random.fold_in(jax.random.key(0), state.count) if stochastic else None
        return updates, StoredState(optax.safe_increment(state.count), stored(new, params, key))

    return optax.GradientTransformation(init, update)
