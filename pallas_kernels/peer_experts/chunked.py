"""Fast form for every backend of XLA: a chunk of tokens at a time, whose rows stay in a cache until they are used.

On CPUs rows of a fitting width are read where they lie instead (`pallas_kernels/cpu_rows.py`), and what the forward
learned about the pairs, a number for each row but up, is kept for the backward.

B batch, T time, P = heads * k experts a token, N experts, R rows of an expert (down, up, and gate if R = 3), D width.

All R rows of an expert are one slice of the table and one operand: a product with the rows that it does not need costs
less than cutting the needed ones out, as the bytes are there already.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import cpu_rows
from pallas_kernels.chunks import over_time
from pallas_kernels.peer_experts.config import chunk_tokens
from pallas_kernels.peer_experts.reference import wide_dtype

Array = jax.Array
DOWN, UP, GATE = range(3)      # rows of an expert


def forward(activation: Callable, x: Array, ids: Array, gates: Array, table: Array) -> Array:
    """y [B, T, D] in x's dtype. ids [B, T, P] outside of the table have gates of 0."""
    return forward_and_inner(activation, x, ids, gates, table)[0]


def forward_and_inner(activation: Callable, x: Array, ids: Array, gates: Array,
                      table: Array) -> tuple[Array, tuple[Array, ...]]:
    """(y, what `backward` can go on with)."""
    wide = wide_dtype(x, gates, table)
    if where_they_lie(table):
        inner = tuple(_dots(table, kind, ids, x.astype(wide)) for kind in range(table.shape[1]) if kind != UP)
        hidden = activation(inner[0])
        weights = gates.astype(wide) * (hidden * inner[1] if inner[1:] else hidden)
        return cpu_rows.combine(*_places(table, UP, ids), _flat(weights)).reshape(x.shape).astype(x.dtype), inner

    def chunk(x, ids, gates):
        rows = _gather(table, ids, wide)
        inner = _product("btqd,btd->btq", rows, x.astype(wide)).reshape(*ids.shape, -1)
        hidden = activation(inner[..., 0])
        if table.shape[1] == 3:
            hidden = hidden * inner[..., 2]
        return _combine(rows, up=gates.astype(wide) * hidden).astype(x.dtype)

    return over_time(chunk, _chunk_length(x, ids, table, wide), x, ids, gates), ()


def backward(activation: Callable, x: Array, ids: Array, gates: Array, table: Array, dy: Array,
             inner: tuple[Array, ...] = ()) -> tuple[Array, Array, Array]:
    """(dx, dgates, factors) by reading the rows again: README.md derives it.

    factors [B, T, P, R] are what the rows of the table's gradient are made of: row r of a pair is factors[..., r] times
    dy where r is the up row, times x else.
    """
    wide = wide_dtype(x, gates, table)
    if inner:
        slope = _dots(table, UP, ids, dy.astype(wide))
        down, gate, dgates, factors = _pairs(activation, gates.astype(wide), slope, *inner)
        dx = cpu_rows.combine(*_places(table, DOWN, ids), _flat(down))
        if gate is not None:
            dx += cpu_rows.combine(*_places(table, GATE, ids), _flat(gate))
        return dx.reshape(x.shape).astype(x.dtype), dgates.astype(gates.dtype), factors

    def chunk(x, ids, gates, dy):
        rows = _gather(table, ids, wide)
        both = jnp.stack([x.astype(wide), dy.astype(wide)], axis=2)
        inner = _product("btqd,btsd->btqs", rows, both).reshape(*ids.shape, -1, 2)
        of_x = [inner[..., kind, 0] for kind in range(table.shape[1]) if kind != UP]
        down, gate, dgates, factors = _pairs(activation, gates.astype(wide), inner[..., UP, 1], *of_x)
        dx = _combine(rows, down=down, gate=gate)
        return dx.astype(x.dtype), dgates.astype(gates.dtype), factors

    return over_time(chunk, _chunk_length(x, ids, table, wide), x, ids, gates, dy)


def where_they_lie(table: Array) -> bool:
    """Whether rows are read where they lie, and the table's dense gradient is made by `dense`."""
    return cpu_rows.serves(table.shape[0] * table.shape[1], table.shape[2])


def _pairs(activation: Callable, weight: Array, slope: Array, before: Array, linear: Array | None = None):
    """(down, gate, dgates, factors): what each pair [B, T, P] adds to the gradients, from its gate, dy . up, x . down
    and, with GLU, x . gate."""
    hidden, pull = jax.vjp(activation, before)
    factor = jnp.ones_like(hidden) if linear is None else linear
    down, = pull(weight * factor * slope)
    gate = None if linear is None else weight * hidden * slope
    up = weight * hidden * factor
    factors = jnp.stack([down, up] if gate is None else [down, up, gate], axis=-1)
    return down, gate, hidden * factor * slope, factors


def _dots(table: Array, kind: int, ids: Array, x: Array) -> Array:
    """[B, T, P]: rows of a kind times x [B, T, D]."""
    return cpu_rows.dots(*_places(table, kind, ids), _flat(x)).reshape(ids.shape)


def _places(table: Array, kind: int, ids: Array) -> tuple[Array, Array]:
    """The table as rows [N * R, D], and which of them [B * T, P] are of this kind; the last expert stands for none."""
    experts, kinds, width = table.shape
    return table.reshape(-1, width), jnp.minimum(_flat(ids), experts - 1) * kinds + kind


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


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
