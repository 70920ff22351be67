"""Fast form for every backend of XLA: a chunk of tokens at a time, whose rows stay in a cache until they are used.

B batch, T time, P = heads * k experts a token, N experts, R rows of an expert (down, up, and gate if R = 3), D width.

All R rows of an expert are one slice of the table and one operand: a product with the rows that it does not need costs
less than cutting the needed ones out, as the bytes are there already.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.chunks import over_time
from pallas_kernels.peer_experts.config import chunk_tokens
from pallas_kernels.peer_experts.reference import wide_dtype

Array = jax.Array


def forward(activation: Callable, x: Array, ids: Array, gates: Array, table: Array) -> Array:
    """y [B, T, D] in x's dtype. ids [B, T, P] outside of the table have gates of 0."""
    wide = wide_dtype(x, gates, table)

    def chunk(x, ids, gates):
        rows = _gather(table, ids, wide)
        inner = _product("btqd,btd->btq", rows, x.astype(wide)).reshape(*ids.shape, -1)
        hidden = activation(inner[..., 0])
        if table.shape[1] == 3:
            hidden = hidden * inner[..., 2]
        return _combine(rows, up=gates.astype(wide) * hidden).astype(x.dtype)

    return over_time(chunk, _chunk_length(x, ids, table, wide), x, ids, gates)


def backward(activation: Callable, x: Array, ids: Array, gates: Array, table: Array,
             dy: Array) -> tuple[Array, Array, Array]:
    """(dx, dgates, factors) by gathering the rows again: README.md derives it.

    factors [B, T, P, R] are what the rows of the table's gradient are made of: row r of a pair is factors[..., r] times
    dy where r is the up row, times x else.
    """
    wide = wide_dtype(x, gates, table)
    glu = table.shape[1] == 3

    def chunk(x, ids, gates, dy):
        rows, weight = _gather(table, ids, wide), gates.astype(wide)
        both = jnp.stack([x.astype(wide), dy.astype(wide)], axis=2)
        inner = _product("btqd,btsd->btqs", rows, both).reshape(*ids.shape, -1, 2)
        slope = inner[..., 1, 1]                                  # dy . up
        hidden, pull = jax.vjp(activation, inner[..., 0, 0])
        factor = inner[..., 2, 0] if glu else jnp.ones_like(hidden)
        down, = pull(weight * factor * slope)
        gate = weight * hidden * slope if glu else None
        dx = _combine(rows, down=down, gate=gate)
        up = weight * hidden * factor
        factors = jnp.stack([down, up, gate] if glu else [down, up], axis=-1)
        return dx.astype(x.dtype), (hidden * factor * slope).astype(gates.dtype), factors

    return over_time(chunk, _chunk_length(x, ids, table, wide), x, ids, gates, dy)


def _gather(table: Array, ids: Array, dtype) -> Array:
    """[B, t, P * R, D]."""
    rows = table.at[ids].get(mode="clip")
    return rows.reshape(*ids.shape[:2], -1, table.shape[-1]).astype(dtype)


def _combine(rows: Array, down: Array | None = None, up: Array | None = None, gate: Array | None = None) -> Array:
    """[B, t, D]: the sum of the rows [B, t, P * R, D] by weights [B, t, P] of each kind; None is 0."""
    pairs = (up if down is None else down).shape
    kinds = (down, up, gate)[:rows.shape[2] // pairs[2]]
    weights = jnp.stack([jnp.zeros(pairs, rows.dtype) if w is None else w for w in kinds], axis=-1)
    return _product("btq,btqd->btd", weights.reshape(*pairs[:2], -1), rows)


def _product(spec: str, *of: Array) -> Array:
    return jnp.einsum(spec, *of, precision=jax.lax.Precision.HIGHEST)


def _chunk_length(x: Array, ids: Array, table: Array, wide) -> int:
    """Steps of time in a chunk."""
    token_bytes = ids.shape[2] * table.shape[1] * table.shape[2] * jnp.dtype(wide).itemsize
    return max(1, min(x.shape[1], chunk_tokens(token_bytes) // x.shape[0]))
