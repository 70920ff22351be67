"""The k largest of n scores on CPUs, one rank after the other for many tokens at a time.

XLA's top-k on CPUs sorts row by row on one core. Here tokens lie side by side, and each rank is a maximum over n of the
scores below the one before: an integer comparison and a maximum an element, with vector instructions. n k operations a
token, so it is for small k. G groups, n scores, T tokens.
"""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array
MOST = 32       # k up to which this is used
WIDTH = 16      # scores of which one loop takes the largest
TERMS = 64      # of those, what is written out for the next loop; more would take long to compile


def serves(dtype: jnp.dtype, k: int) -> bool:
    """Whether scores of this dtype and so many ranks are for `largest`."""
    return dtype == jnp.float32 and k <= MOST


def largest(scores: Array, k: int) -> tuple[Array, Array]:
    """(values, places) [G, k, T] of the k largest of scores [G, n, T] float32, as `jax.lax.top_k` along n orders them:
    largest first, of equal ones that of the smaller place."""
    groups, size, tokens = scores.shape
    with jax.enable_x64(True):       # a score and its place in one integer
        keys = _with_places(scores)
        lowest = jnp.int64(-2**63)
        padding = -size % WIDTH
        keys = jnp.pad(keys, ((0, 0), (0, padding), (0, 0)), constant_values=lowest) if padding else keys
        keys = keys.reshape(groups, WIDTH, -1, tokens)

        def rank(r, last_and_out):
            last, out = last_and_out
            below = [jnp.where(keys[:, i] < last[:, None], keys[:, i], lowest) for i in range(WIDTH)]
            best = functools.reduce(jnp.maximum, below)
            best = (functools.reduce(jnp.maximum, [best[:, i] for i in range(best.shape[1])])
                    if best.shape[1] <= TERMS else best.max(1))
            return best, jax.lax.dynamic_update_slice_in_dim(out, best[:, None], r, axis=1)

        start = jnp.full_like(keys, 2**63 - 1, shape=(groups, tokens)), jnp.zeros_like(keys, shape=(groups, k, tokens))
        found = jax.lax.fori_loop(jnp.int32(0), jnp.int32(k), rank, start)[1]
        values = _flip((found >> 32).astype(jnp.int32))
        return jax.lax.bitcast_convert_type(values, jnp.float32), size - 1 - found.astype(jnp.int32)


def _with_places(scores: Array) -> Array:
    """int64, in the order of the scores, the earlier place the larger of equal ones."""
    order = _flip(jax.lax.bitcast_convert_type(scores, jnp.int32)).astype(jnp.int64)
    return (order << 32) | (scores.shape[1] - 1 - jax.lax.broadcasted_iota(jnp.int64, scores.shape, 1))


def _flip(bits: Array) -> Array:
    """Bits of floats as integers in the same order, and back."""
    return bits ^ ((bits >> 31) & jnp.int32(0x7fffffff))
