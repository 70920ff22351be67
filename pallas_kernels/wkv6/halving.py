"""Products of the decays between any two positions of a chunk, by halving: nothing divides and nothing overflows.

A pair of positions j < i of a chunk falls into the two halves of exactly one block of the sizes 2, 4, 8, ..., c. Split
at the middle of that block, the decays between them are those before i in its half times those after j in its half:

    prod d[j+1 .. i-1] = before[i] after[j]

so the scores of all pairs are one matrix product a block size, masked to its pairs. Every factor is a product of the
decays themselves: one that underflows is one that is zero, and a decay of exactly zero (a reset) needs no care. The
usual exp(W_i) exp(-W_j) overflows, and a sum W over a chunk that holds a strong decay forgets the weak ones.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Level(NamedTuple):
    """Products of decays inside blocks of `size` positions, each [..., c, K]."""
    size: int
    before: Array       # of the positions of the block before this one
    after: Array        # of those after it
    total: Array        # of the whole block


def levels(decay: Array, swap=None) -> list[Level]:
    """Levels of size 1, 2, 4, ..., c for decay [..., c, K], c a power of two.

    swap(x, size): x with neighbouring blocks of `size` rows exchanged; jnp's reshape where it is not given.
    """
    swap = swap or swap_blocks
    length = decay.shape[-2]
    position = jax.lax.broadcasted_iota(jnp.int32, (length, decay.shape[-1]), 0)
    out = [Level(1, jnp.ones_like(decay), jnp.ones_like(decay), decay)]
    while out[-1].size < length:
        size, before, after, total = out[-1]
        other, second = swap(total, size), (position & size) != 0
        out.append(Level(2 * size, jnp.where(second, before * other, before), jnp.where(second, after, after * other),
                         total * other))
    return out


def swap_blocks(x: Array, size: int) -> Array:
    """x [..., c, K] with neighbouring blocks of `size` rows exchanged."""
    *batch, length, width = x.shape
    return jnp.flip(x.reshape(*batch, length // (2 * size), 2, size, width), -3).reshape(x.shape)


def split_at(length: int, row: Array, column: Array) -> Array:
    """For row i and column j < i, counted modulo the chunk's length: size <= this < 2 size for the level of the pair.

    0 for the other places.
    """
    row, column = row & (length - 1), column & (length - 1)
    return jnp.where(row > column, row ^ column, 0)


def places(*shape: int) -> tuple[Array, Array]:
    """Row and column of every place of a matrix."""
    return tuple(jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))


product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def scores(rows: list[Array], columns: list[Array], products: list[Level]) -> Array:
    """sum over K of row_i column_j prod d[j+1 .. i-1] for j < i, else 0, for each of `rows` with each of `columns`.

    n rows and n columns, all [..., c, K]; returns [..., n c, n c] in blocks of c by c.
    """
    length, repeats = rows[0].shape[-2], len(rows)
    level_of = split_at(length, *places(repeats * length, repeats * length))
    out = jnp.zeros((*rows[0].shape[:-2], repeats * length, repeats * length), rows[0].dtype)
    for level in products[:-1]:
        here = product(jnp.concatenate([x * level.before for x in rows], axis=-2),
                       transposed(jnp.concatenate([x * level.after for x in columns], axis=-2)))
        out = jnp.where(level_of >= level.size, here, out)        # the larger levels come after
    return out
