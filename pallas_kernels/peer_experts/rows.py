"""The gradient of a table as sums over sorted pairs of token and expert: dense, or the touched rows alone.

M tokens, P experts a token, N experts, R rows of an expert, D width; a pair is a token and an expert that it chose.

Pairs are sorted by expert once, so that the sum of a row runs over neighbours and in a fixed order: the result is the
same from run to run, and no [M, P, D] array is made. Ids of N stand for no expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.chunks import scan_time
from pallas_kernels.peer_experts.config import chunk_bytes

Array = jax.Array


class TouchedRows(NamedTuple):
    """ids [U] int32: the experts that were chosen, ascending, then N (which is no row); count [] of the former."""
    ids: Array
    count: Array


class SortedPairs(NamedTuple):
    """order [M * P]: which pair; slot [M * P]: the row, in ascending order, that it is added to."""
    order: Array
    slot: Array


def num_touched(num_pairs: int, num_experts: int) -> int:
    """U, the rows that a sink has: no more can be touched."""
    return min(num_pairs, num_experts)


def sort_pairs(ids: Array) -> SortedPairs:
    """Pairs of ids [any] by expert; equal ones in the order they come in. The slot is the expert itself."""
    flat = ids.reshape(-1)
    slot, order = jax.lax.sort_key_val(flat, jax.lax.iota(jnp.int32, flat.size))
    return SortedPairs(order, slot)


def compact(pairs: SortedPairs, num_experts: int) -> tuple[SortedPairs, TouchedRows]:
    """The same pairs with slots numbered among the touched experts, and which those are."""
    expert = pairs.slot
    first = jnp.concatenate([jnp.ones(1, bool), expert[1:] != expert[:-1]])
    slot = jnp.cumsum(first, dtype=jnp.int32) - 1
    ids = jnp.full(num_touched(expert.size, num_experts), num_experts, jnp.int32)
    ids = ids.at[slot].set(expert, mode="drop", indices_are_sorted=True)
    return SortedPairs(pairs.order, slot), TouchedRows(ids, (first & (expert < num_experts)).sum(dtype=jnp.int32))


def sum_pairs(pairs: SortedPairs, factors: Array, x: Array, dy: Array, num_rows: int) -> Array:
    """[num_rows, R, D]: each pair's factors [M, P, R] times x (down, gate) or dy (up), [M, D], added to its slot."""
    num_chosen, kinds = factors.shape[-2:]
    factors = factors.reshape(-1, kinds)
    sources = [x, dy, x][:kinds]

    def chunk(total, order, slot):
        token = order[0] // num_chosen
        parts = [source[token].astype(factors.dtype) for source in sources]
        rows = jnp.stack(parts, axis=1) * factors[order[0]][..., None]
        return total.at[slot[0]].add(rows, mode="drop", indices_are_sorted=True), ()

    size = max(1, chunk_bytes() // (kinds * x.shape[-1] * factors.dtype.itemsize))
    zeros = jnp.zeros_like(factors, shape=(num_rows, kinds, x.shape[-1]))
    return scan_time(chunk, min(size, pairs.order.size), zeros, pairs.order[None], pairs.slot[None])[0]


def merge_rows(ids: Array, rows: Array, num_experts: int) -> tuple[TouchedRows, Array]:
    """Touched rows of several microbatches or devices as one set: equal ids are summed.

    ids [S] int32, num_experts where there is no row; rows [S, R, D]. Returns the ids [min(S, num_experts)] and rows of
    as many. Sums run in the order of the input.
    """
    pairs, touched = compact(sort_pairs(ids), num_experts)
    out = jnp.zeros_like(rows, shape=(touched.ids.size, *rows.shape[1:]))
    return touched, out.at[pairs.slot].add(rows[pairs.order], mode="drop", indices_are_sorted=True)
