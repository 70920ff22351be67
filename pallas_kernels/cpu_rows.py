"""Rows of a table by index on CPUs, read where they lie: the rows that are wanted are never gathered into an array.

XLA's CPU backend compiles a sum of gathers to one loop over the columns that reads each row at its address, with vector
instructions and on all cores; a gather in front of a product writes the rows to memory first, and a reduction over
columns in the same fusion is not vectorised, as floats are not reordered.

M tokens, P rows a token, S rows of the table, D columns.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import automatic_axes, current_platform

Array = jax.Array
LANES = 16          # columns that a dot product keeps apart until its end: a vector register of float32
COLUMNS = 256       # columns of a dot product in one loop, a term of the sum for each LANES of them
TOKENS = 512        # tokens whose sums exist for each lane at a time
GROUP = 16          # rows of a token that one loop adds up


def serves(rows: int, columns: int) -> bool:
    """Whether rows of such a table are to be read by these functions: on CPUs, tokens not split over a mesh."""
    return (current_platform() == "cpu" and columns % LANES == 0 and rows <= jnp.iinfo(jnp.int32).max
            and automatic_axes() is None)


def dots(table: Array, at: Array, x: Array) -> Array:
    """[M, P] in x's dtype: table[at[m, p]] . x[m], with table [S, D], at [M, P] int32 in 0..S-1 and x [M, D]."""
    columns = table.shape[1]
    table = table.reshape(-1, columns // LANES, LANES)
    parts = [_dots(table, at, x[:, first:first + COLUMNS], first // LANES) for first in range(0, columns, COLUMNS)]
    return functools.reduce(jnp.add, parts)


def _dots(table: Array, at: Array, x: Array, first: int) -> Array:
    """The same for table [S, D / LANES, LANES] and columns first * LANES and on, as many as x has.

    A product with ones adds up the sums over lanes, as a reduction would go from one number to the next, and no fusion
    takes a product in.
    """
    tokens, chosen = at.shape
    x = x.reshape(tokens, 1, -1, LANES)
    size = min(TOKENS, tokens)

    def part(at, x):
        terms = [_rows(table, (at, jnp.full_like(at, first + c)), x.dtype) * x[:, :, c] for c in range(x.shape[2])]
        sums = functools.reduce(jnp.add, terms)
        return jnp.matmul(sums, jnp.ones_like(sums, shape=LANES), precision=jax.lax.Precision.HIGHEST)

    def step(i, out):
        return jax.lax.dynamic_update_slice_in_dim(out, part(_part(at, i, size), _part(x, i, size)), i * size, 0)

    whole = tokens // size
    if whole == 1:
        out = part(at[:size], x[:size])
    else:
        out = jax.lax.fori_loop(0, whole, step, jnp.zeros_like(x, shape=(whole * size, chosen)))
    if tokens == whole * size:
        return out
    return jnp.concatenate([out, part(at[whole * size:], x[whole * size:])])


def combine(table: Array, at: Array, weights: Array) -> Array:
    """[M, D] in the dtype of weights [M, P]: the sum over p of weights[m, p] * table[at[m, p]], in order of p."""
    tokens, chosen = at.shape
    at, weights = at.T, weights.T
    size = min(GROUP, chosen)

    def add(y, at, weights):
        terms = [weights[p][:, None] * _rows(table, at[p], y.dtype) for p in range(at.shape[0])]
        return functools.reduce(jnp.add, terms, y)

    whole = chosen // size
    y = jax.lax.fori_loop(0, whole, lambda i, y: add(y, _part(at, i, size), _part(weights, i, size)),
                          jnp.zeros_like(weights, shape=(tokens, table.shape[1])))
    return y if chosen == whole * size else add(y, at[whole * size:], weights[whole * size:])


def _rows(table: Array, at: Array | tuple[Array, Array], dtype: jnp.dtype) -> Array:
    return table.at[at].get(mode="promise_in_bounds", wrap_negative_indices=False).astype(dtype)


def _part(x: Array, i: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, 0)
