"""The k largest of n scores on CPUs, one rank after the other for many tokens at a time.

XLA's top-k on CPUs sorts row by row on one core. Here the scores of a token lie in groups, of each of which the largest
is known: a rank is the largest of these, and only the group that it came from is looked at again, for the largest of
what is below. That is n / GROUP + GROUP scores a rank, in loops over neighbours, which XLA compiles to vector
instructions.

A score and its place are one integer, so that no two are equal. R tokens, each with its scores; G groups.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
MOST = 32       # k up to which this is used
GROUP = 32      # scores of a group
LOWEST = -2 ** 63
LAST = np.int32(-1).view(np.float32)    # the NaN that is behind every score


def serves(dtype: jnp.dtype, k: int) -> bool:
    """Whether scores of this dtype and so many ranks are for `largest` and `largest_sums`."""
    return dtype == jnp.float32 and k <= MOST


def largest(scores: Array, k: int) -> tuple[Array, Array]:
    """(values, places) [R, k] of the k largest of scores [R, n] float32, as `jax.lax.top_k` orders them: largest first,
    of equal ones that of the smaller place."""
    rows = scores.shape[0]
    padding = -scores.shape[1] % GROUP
    if padding:
        scores = jnp.pad(scores, ((0, 0), (0, padding)), constant_values=LAST)
    size = scores.shape[1]
    groups = size // GROUP
    table = scores.reshape(-1, GROUP)
    token = jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)

    def members(group):
        inside = jax.lax.broadcasted_iota(jnp.int32, (rows, GROUP), 1)
        return _keys(_take(table, token * groups + group), group[:, None] * GROUP + inside, size)

    with jax.enable_x64(True):
        split = scores.reshape(rows, groups, GROUP)
        place = _iota(split, 1) * GROUP + _iota(split, 2)
        return _ranks(_largest(_keys(split, place, size)), members, GROUP, size, k)


def largest_sums(first: Array, second: Array) -> tuple[Array, Array]:
    """(values, places) [R, k] of the k largest first[:, a] + second[:, b] with (a + 1)(b + 1) <= k, of [R, k] float32;
    the place is a k + b. Of equal sums that of the smaller place is first."""
    rows, k = first.shape

    def keys(sums, a, b):
        return jnp.where((a + 1) * (b + 1) <= k, _keys(sums, a * k + b, k * k), LOWEST)

    def members(a):
        own = _take(first.reshape(-1), jax.lax.broadcasted_iota(jnp.int32, (rows,), 0) * k + a)
        return keys(own[:, None] + second, a[:, None], _iota(second, 1))

    with jax.enable_x64(True):
        sums = first[:, :, None] + second[:, None]
        return _ranks(_largest(keys(sums, _iota(sums, 1), _iota(sums, 2))), members, k, k * k, k)


def _ranks(heads: Array, members: Callable[[Array], Array], width: int, size: int, k: int) -> tuple[Array, Array]:
    """(values, places) [R, k] from the largest key of each group, heads [R, G], and the keys [R, width] of the groups
    [R] that are asked for; places are below `size`."""
    rows = heads.shape[0]

    def rank(r, state):
        heads, best, below, found = state
        heads = jnp.where(heads == best[:, None], below[:, None], heads)
        best = _largest(heads)
        inside = members(jax.lax.div(_place(best, size), jnp.int32(width)))
        below = _largest(jnp.where(inside < best[:, None], inside, LOWEST))
        return heads, best, below, jax.lax.dynamic_update_slice_in_dim(found, best[None], r, axis=0)

    none = jnp.full_like(heads, 2**63 - 1, shape=(rows,))      # the key of no score
    found = jax.lax.fori_loop(jnp.int32(0), jnp.int32(k), rank,
                              (heads, none, none, jnp.zeros_like(heads, shape=(k, rows))))[3].T
    values = _flip((found >> 32).astype(jnp.int32))
    return jax.lax.bitcast_convert_type(values, jnp.float32), _place(found, size)


def _keys(scores: Array, place: Array, size: int) -> Array:
    """int64, in the order of the scores, the earlier place the larger of equal ones; places are below `size`."""
    order = _flip(jax.lax.bitcast_convert_type(scores, jnp.int32)).astype(jnp.int64)
    return (order << 32) | (size - 1 - place).astype(jnp.int64)


def _place(keys: Array, size: int) -> Array:
    return size - 1 - keys.astype(jnp.int32)


def _flip(bits: Array) -> Array:
    """Bits of floats as integers in the same order, and back."""
    return bits ^ ((bits >> 31) & jnp.int32(0x7fffffff))


def _largest(keys: Array) -> Array:
    return keys.max(-1)


def _take(table: Array, at: Array) -> Array:
    return table.at[at].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _iota(like: Array, axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, like.shape, axis)
