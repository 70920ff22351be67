"""Weighted sums of rows of a table: what a product key memory reads.

M tokens, H heads, k rows a head, P = H * k, N rows, D width.
"""

import jax
import jax.numpy as jnp

from lm.core.types import Array
from pallas_kernels.chunks import over_time
from pallas_kernels.peer_experts.rows import SortedPairs, TouchedRows, compact, sort_pairs, sum_pairs

CHUNK_BYTES = 1 << 24  # gathered rows that exist at a time


def weighted_rows(ids: Array, gates: Array, table: Array) -> Array:
    """y [1, M, D] float32 = sum over p of gates[p] table[ids[p]], with ids [1, M, H, k] int32, gates alike and table
    [N, D]; an id outside of 0..N-1 adds nothing. The rows of all tokens, [M, P, D], are never held.

    Gradients: gates, and the table, dense; its sums run over sorted pairs, in a fixed order.
    """
    return _sum(*_known(ids, gates, table), table)


def weighted_rows_with_sink(ids: Array, gates: Array, table: Array, sink: Array) -> tuple[Array, TouchedRows]:
    """`weighted_rows`, and the ids of the rows that were chosen; the gradient of `sink` [min(M H k, N), D], which is
    zeros, is that of these rows, and the table gets none."""
    ids, gates = _known(ids, gates, table)
    pairs, touched = compact(sort_pairs(ids), table.shape[0])
    return _sum_with_sink(ids, gates, jax.lax.stop_gradient(table), sink, pairs), touched


def _known(ids: Array, gates: Array, table: Array) -> tuple[Array, Array]:
    known = (ids >= 0) & (ids < table.shape[0])
    flat = lambda a: a.reshape(*a.shape[:2], -1)
    return flat(jnp.where(known, ids, table.shape[0])), flat(jnp.where(known, gates, 0))


@jax.custom_vjp
def _sum(ids: Array, gates: Array, table: Array) -> Array:
    wide = jnp.promote_types(gates.dtype, jnp.float32)

    def chunk(ids, gates):
        return jnp.einsum("btp,btpd->btd", gates.astype(wide), _rows(table, ids, wide), precision="highest")

    return over_time(chunk, _length(ids, table), ids, gates)


def _forward(ids, gates, table):
    return _sum(ids, gates, table), (ids, gates, table)


def _backward(saved, dy):
    ids, gates, table = saved
    dgates, dtable = _gradients(ids, gates, table, dy, sort_pairs(ids), table.shape[0])
    return None, dgates, dtable.astype(table.dtype)


_sum.defvjp(_forward, _backward)


@jax.custom_vjp
def _sum_with_sink(ids: Array, gates: Array, table: Array, sink: Array, pairs: SortedPairs) -> Array:
    return _sum(ids, gates, table)


def _with_sink_forward(ids, gates, table, sink, pairs):
    return _sum(ids, gates, table), (ids, gates, table, sink, pairs)


def _with_sink_backward(saved, dy):
    ids, gates, table, sink, pairs = saved
    dgates, dsink = _gradients(ids, gates, table, dy, pairs, sink.shape[0])
    return None, dgates, None, dsink.astype(sink.dtype), None


_sum_with_sink.defvjp(_with_sink_forward, _with_sink_backward)


def _gradients(ids: Array, gates: Array, table: Array, dy: Array, pairs: SortedPairs,
               num_rows: int) -> tuple[Array, Array]:
    """Of gates, and of the rows, [num_rows, D], that the pairs are added to."""
    def chunk(ids, dy):
        return jnp.einsum("btd,btpd->btp", dy, _rows(table, ids, dy.dtype), precision="highest")

    dgates = over_time(chunk, _length(ids, table), ids, dy)
    flat = dy.reshape(-1, dy.shape[-1])
    weights = gates.reshape(-1, gates.shape[-1], 1).astype(dy.dtype)
    return dgates.astype(gates.dtype), sum_pairs(pairs, weights, flat, flat, num_rows)[:, 0]


def _rows(table: Array, ids: Array, dtype: jnp.dtype) -> Array:
    return table.at[ids].get(mode="clip").astype(dtype)


def _length(ids: Array, table: Array) -> int:
    return max(1, min(ids.shape[1], CHUNK_BYTES // (4 * ids.shape[0] * ids.shape[2] * table.shape[1])))
