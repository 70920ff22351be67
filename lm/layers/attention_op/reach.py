"""How much of a square of `halving` is seen at all: in rows that hold several documents, often little or nothing.

A square is the later half of 2 w rows against the earlier half. Only a document that stands on both sides of the middle
is seen in it: none where one begins just there, else the first queries and the last keys, as far as that document
reaches. So of every level a corner is computed, the smallest of a few sizes that holds what is seen in all its squares.

Shape legend: B rows, T tokens, n squares of a level, w their width.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array


def sizes(width: int, block: int) -> tuple[int, ...]:
    """Sides of the corners to choose from: all, a half and a quarter where they are a block or more, nothing."""
    return (width, *(width // part for part in (2, 4) if width // part >= block), 0)


def corners(q_documents: Array, k_documents: Array, widths: Sequence[int], block: int, tokens: int) -> Array:
    """[B, levels] int32: for each width which of its `sizes` is the last that holds all that a row's queries see in its
    squares; 0 where it takes them whole.

    Documents are [B, T] in any order; where their numbers do not ascend in a row, more is taken than needed, never
    less. Positions from `tokens` on do not count.
    """
    real = jnp.arange(q_documents.shape[1]) < tokens
    queries = jnp.where(real & (q_documents >= 0), q_documents, jnp.iinfo(q_documents.dtype).max)
    keys = jnp.where(real & (k_documents >= 0), k_documents, -1)
    found = []
    for width in widths:
        rows = queries.shape[0]
        late = queries.reshape(rows, -1, 2, width)[:, :, 1]  # [B, n, w]
        early = keys.reshape(rows, -1, 2, width)[:, :, 0]
        held = []
        for size in sizes(width, block)[1:]:
            # No query outside of the corner sees any key, and no key outside is seen by any query.
            enough = late[..., size:].min(-1) > early.max(-1)
            if size:
                enough &= late.min(-1) > early[..., :width - size].max(-1)
            held.append(enough.all(-1))
        found.append(sum(one.astype(jnp.int32) for one in held))
    return jnp.stack(found, axis=-1) if found else jnp.zeros((queries.shape[0], 0), jnp.int32)
