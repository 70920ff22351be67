"""Which row of a table belongs to the pair (i, j) of sub-keys, of n in each half.

grid: i n + j. Every row moves when n grows.
shell: j^2 + i where i < j, else i^2 + i + j. The pairs of the first n sub-keys are the first n^2 rows whatever n is, so
that more sub-keys append rows and change none.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np

from lm.core.types import Array

Numbering = Literal["shell", "grid"]


def numbered(found: Array, n: int, stride: int, numbering: Numbering) -> Array:
    """Row numbers of `found`, which are i n + j, in a table of stride^2 rows; n may be less than stride."""
    if numbering == "grid" and n == stride:
        return found
    i, j = found // n, found % n
    return i * stride + j if numbering == "grid" else jnp.where(i < j, j * j + i, i * i + i + j)


def shell_of_grid(n: int) -> np.ndarray:
    """[n^2] int64: at i n + j the shell number of (i, j)."""
    i, j = np.divmod(np.arange(n * n), n)
    return np.where(i < j, j * j + i, i * i + i + j)


def to_shell(rows: np.ndarray, n: int, axis: int) -> np.ndarray:
    """An array whose `axis` is numbered i n + j, in shell numbering."""
    return np.take(rows, np.argsort(shell_of_grid(n)), axis)
