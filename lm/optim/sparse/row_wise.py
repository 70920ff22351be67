"""An optimizer whose every row of a table is a parameter of its own, which steps when a token chose the row, else not.

`row_wise(tx)` holds the state of an optax transformation for each row, also its count of steps, and runs it on the rows
that were touched: on their subsequence of steps these get exactly what `tx` gives, bias correction included. What the
dense form of `tx` does besides is left out: moments of untouched rows do not decay, momentum does not carry them on,
and weight decay does not shrink them. Where every row is touched in every step both forms are equal.

Shapes: N rows of a table, U touched ones.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.core.types import Array

CHUNK_BYTES = 1 << 24  # rows of the table that are worked on at a time


class Rows(NamedTuple):
    """ids [U] int32, each row once, N where there is none; values [U, ...]: gradients of these rows."""

    ids: Array
    values: Array


class RowWise(NamedTuple):
    """Optax-style. init(table [N, ...]) -> state, every array of it [N, ...]. update(table, state, gradient, scale,
    rate, decay) -> (table, state), in place where they are donated: rows change by -rate * (direction(scale * gradient)
    + decay * row). gradient: `Rows`, or dense [N, ...] with `touched` [N] bool."""

    init: Callable[[Array], Any]
    update_rows: Callable[..., tuple[Array, Any]]
    update_dense: Callable[..., tuple[Array, Any]]


def row_wise(tx: optax.GradientTransformation) -> RowWise:
    """`tx`, a direction without learning rate and decay, on the rows of one table."""

    def init(table: Array) -> Any:
        return jax.vmap(tx.init)(table)

    def step(rows: Array, state: Any, gradient: Array, scale: Array, rate: Array, decay: float) -> tuple[Array, Any]:
        direction, state = jax.vmap(tx.update)(gradient * scale, state, rows)
        return rows - rate * (direction + decay * rows if decay else direction), state

    def update_rows(table: Array, state: Any, gradient: Rows, scale: Array, rate: Array,
                    decay: float) -> tuple[Array, Any]:
        N, U = table.shape[0], gradient.ids.shape[0]
        size = min(U, max(1, CHUNK_BYTES // (table.dtype.itemsize * math.prod(table.shape[1:]))))
        # The last slots are those without a row: chunks of nothing but these are not worked through.
        chunks = -(-jnp.max(jnp.where(gradient.ids < N, jnp.arange(1, U + 1), 0)) // size)

        def one(index: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            table, state = carry
            start = jnp.minimum(index * size, U - size)  # the last chunk begins earlier, and skips what was done
            slots = start + jnp.arange(size)
            ids = jax.lax.dynamic_slice_in_dim(gradient.ids, start, size)
            # Beyond the table and different from each other, so that they are dropped and all are unique.
            ids = jnp.where((slots < index * size) | (ids >= N), N + slots, ids)
            take = lambda a: a.at[ids].get(mode="clip")
            put = lambda a, rows: a.at[ids].set(rows.astype(a.dtype), mode="drop", unique_indices=True)
            rows, after = step(take(table), jax.tree.map(take, state),
                               jax.lax.dynamic_slice_in_dim(gradient.values, start, size), scale, rate, decay)
            return put(table, rows), jax.tree.map(put, state, after)

        return jax.lax.fori_loop(0, chunks, one, (table, state))

    def update_dense(table: Array, state: Any, gradient: Array, touched: Array, scale: Array, rate: Array,
                     decay: float) -> tuple[Array, Any]:
        def choose(new: Array, old: Array) -> Array:
            return jnp.where(touched.reshape(-1, *[1] * (old.ndim - 1)), new.astype(old.dtype), old)
        return jax.tree.map(choose, step(table, state, gradient, scale, rate, decay), (table, state))

    return RowWise(init, update_rows, update_dense)


def merged(ids: Array, values: Array, num_rows: int) -> Rows:
    """The rows of several parts as one set: equal ids are summed. ids [P, U], num_rows for none; values [P, U, ...].

    One part, whose ids are ascending and unique, stays as it is. Of more, min(P * U, num_rows) slots come out; sums run
    in the order of the parts.
    """
    if ids.shape[0] == 1:
        return Rows(ids[0], values[0])
    flat, values = ids.reshape(-1), values.reshape(-1, *values.shape[2:])
    slots = min(flat.size, num_rows)
    ids, order = jax.lax.sort_key_val(flat, jnp.arange(flat.size))
    slot = jnp.cumsum(jnp.concatenate([jnp.zeros(1, bool), ids[1:] != ids[:-1]]), dtype=jnp.int32)
    out = jnp.zeros((slots, *values.shape[1:]), values.dtype)
    return Rows(jnp.full(slots, num_rows, jnp.int32).at[slot].set(ids, mode="drop", indices_are_sorted=True),
                out.at[slot].add(values[order], mode="drop", indices_are_sorted=True))
