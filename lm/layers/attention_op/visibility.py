"""Who sees whom: the one definition of the attention mask, shared by every implementation.

Shape legend: B batch, T queries, S keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

EMPTY = -1e30  # score of a pair that does not see each other; finite, so that no inf - inf arises


class Visibility(NamedTuple):
    """Everything that decides whether query i sees key j. Arrays may be None: that condition then does not apply.

    `aligned`: rows are tokens in order; query i stands at row i + `offset` of the keys, sees rows up to its own.
    Otherwise `q_positions` [B, T] and `k_positions` [B, S] give the order. `window` w: only distances below w.
    A key is of the query's document, and a key with a negative document is an empty slot.
    """

    aligned: bool
    offset: int = 0
    window: int | None = None
    q_positions: Array | None = None
    k_positions: Array | None = None
    q_documents: Array | None = None
    k_documents: Array | None = None

    def columns(self, start: int, stop: int, num_keys: int) -> tuple[int, int]:
        """Range of keys that queries [start, stop) can see by their order; empty when first >= last."""
        if not self.aligned:
            return 0, num_keys
        last = min(num_keys, stop + self.offset)
        first = 0 if self.window is None else max(0, start + self.offset - self.window + 1)
        return min(first, last), last

    def mask(self, rows: tuple[int, int], columns: tuple[int, int]) -> Array | None:
        """Bool [B or 1, rows, columns] of the pairs that see each other; None when all do."""
        (i0, i1), (j0, j1) = rows, columns
        keep = []
        if self.aligned:
            distance = self.offset + i0 - j0 + jnp.arange(i1 - i0)[:, None] - jnp.arange(j1 - j0)
            if i0 + self.offset < j1 - 1:
                keep.append((distance >= 0)[None])
            if self.window is not None and i1 - 1 + self.offset - j0 >= self.window:
                keep.append((distance < self.window)[None])
        elif self.q_positions is not None:
            distance = self.q_positions[:, i0:i1, None] - self.k_positions[:, None, j0:j1]
            keep.append(distance >= 0)
            if self.window is not None:
                keep.append(distance < self.window)
        if self.k_documents is not None:
            documents = self.k_documents[:, None, j0:j1]
            keep.append((self.q_documents[:, i0:i1, None] == documents) & (documents >= 0))
        if not keep:
            return None
        both = keep[0]
        for condition in keep[1:]:
            both = both & condition
        return both
