"""The dense gradient of a table on CPUs: each row of it fetches its own pairs, so that it is written once.

M tokens, P experts a token, N experts, R rows of an expert, D width; a pair is a token and an expert that it chose.

With about as many pairs as experts most rows have a few. The first ROUNDS pairs of each expert are found by as many
scatters of integers; one loop over the rows then multiplies and adds what they stand for, zeros included, on all cores.
What is left, the later pairs of experts that many tokens chose, is added row by row in the order of the pairs.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.peer_experts.config import chunk_bytes
from pallas_kernels.peer_experts.rows import sort_pairs, sum_pairs

Array = jax.Array


def rounds(num_pairs: int, num_experts: int) -> int:
    """Pairs of an expert that its row fetches: where N pairs or fewer are drawn at random, few experts have more."""
    return 2 if 4 * num_pairs <= num_experts else 3 if 2 * num_pairs <= num_experts else 4


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def sum_dense(ids: Array, factors: Array, x: Array, dy: Array, num_experts: int) -> Array:
    """[N, R, D]: each pair's factors [M, P, R] times x (down, gate) or dy (up), [M, D], added to its expert's row.

    ids [M, P], N where there is no expert. A row's sum is in the order of the pairs.
    """
    chosen, kinds = factors.shape[-2:]
    ids, factors = ids.reshape(-1), factors.reshape(-1, kinds)
    sources = jnp.stack([source.astype(factors.dtype) for source in (x, dy, x)[:kinds]], axis=1)
    none, pair = ids.size, jax.lax.iota(jnp.int32, ids.size)
    left, total = ids < num_experts, None
    for _ in range(rounds(ids.size, num_experts)):
        first = jnp.full_like(ids, none, shape=(num_experts,)).at[ids].min(jnp.where(left, pair, none), mode="drop")
        left &= first.at[ids].get(mode="clip") != pair
        found = jnp.minimum(first, none - 1)
        part = jnp.where((first < none)[:, None, None], factors[found][..., None] * sources[found // chosen], 0)
        total = part if total is None else total + part
    return _add_pairs(total, ids, factors, sources, left)


def _add_pairs(total: Array, ids: Array, factors: Array, sources: Array, which: Array) -> Array:
    """total [N, R, D] and the pairs for which `which` [M * P] is true."""
    count, pairs = which.sum(dtype=jnp.int32), ids.size
    size = min(pairs, max(1, chunk_bytes() // (sources[0].size * sources.dtype.itemsize)))
    place = jnp.where(which, jnp.cumsum(which, dtype=jnp.int32) - 1, pairs + size)
    listed = jnp.full_like(ids, pairs, shape=(pairs + size,)).at[place].set(jax.lax.iota(jnp.int32, pairs), mode="drop")

    def chunk(trip_and_total):
        trip, total = trip_and_total
        pair = jax.lax.dynamic_slice_in_dim(listed, trip * size, size)
        slot = ids.at[pair].get(mode="fill", fill_value=total.shape[0])
        pair = jnp.minimum(pair, pairs - 1)
        rows = factors[pair][..., None] * sources[pair // (pairs // sources.shape[0])]
        return trip + 1, total.at[slot].add(rows, mode="drop")

    # Trips are counted one by one: a loop that a single step of `size` ends is dropped by the XLA of jax 0.10.2 where
    # its bounds are constants.
    trips = -(-count // size)
    return jax.lax.while_loop(lambda state: state[0] < trips, chunk, (jnp.zeros_like(trips), total))[1]


def _forward(ids, factors, x, dy, num_experts):
    return sum_dense(ids, factors, x, dy, num_experts), (ids, factors, x, dy)


def _backward(num_experts, saved, cotangent):
    ids, *arrays = saved
    by_sorting = lambda factors, x, dy: sum_pairs(sort_pairs(ids), factors, x, dy, num_experts)
    return None, *jax.vjp(by_sorting, *arrays)[1](cotangent)


sum_dense.defvjp(_forward, _backward)
