"""What Triton kernels over [B, T, C] share: a program has one batch row and `WIDTH` channels and goes through time.

Channels beyond the last are masked: Triton checks no bounds. Steps are read and written one row at a time, as a tensor
in Triton's registers cannot be indexed; the rows of a block of steps do not depend on the state, so they are asked for
before the chain of the block, and one block ahead.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

Array = jax.Array
WIDTH = 32          # channels of a program: one a thread of its one warp, so that many programs hide each other's waits
WARPS = 1


def grid_and_specs(shape: tuple[int, int, int]) -> tuple[tuple[int, int], dict[str, pl.BlockSpec]]:
    """The grid (batch, channels), and what a program sees: "block" [T, W], "row" [W], "rows" [N, W] and "words" [N]."""
    batch, length, width = shape
    rows = lambda num: pl.BlockSpec((None, num, WIDTH), lambda b, c: (b, 0, c))
    return (batch, pl.cdiv(width, WIDTH)), {
        "block": rows(length), "rows": rows,
        "row": pl.BlockSpec((None, WIDTH), lambda b, c: (b, c)),
        "words": lambda num: pl.BlockSpec((None, num), lambda b, c: (b, 0)),
    }


class Channels:
    """Reads and writes of the program's channels; `width` is the whole number of channels."""

    def __init__(self, width: int):
        from jax.experimental.pallas import triton as plt
        self._load, self._store = plt.load, plt.store
        self._masks = {}
        if width % WIDTH:
            mask = pl.program_id(1) * WIDTH + jnp.arange(WIDTH) < width
            self._masks = {"mask": mask}

    def read(self, ref, step=None) -> Array:
        """Row `step` of [N, W], or all of [W]; 0 in channels that are not there."""
        other = {"other": 0.0} if self._masks else {}
        return self._load(ref if step is None else ref.at[jnp.asarray(step, jnp.int32)], **self._masks, **other)

    def write(self, ref, value: Array, step=None) -> None:
        """The opposite, rounded to the array's dtype."""
        self._store(ref if step is None else ref.at[jnp.asarray(step, jnp.int32)], value.astype(ref.dtype),
                    **self._masks)


def through_time(length: int, steps: int, backwards: bool, read: Callable, block: Callable, carry):
    """carry = block(start, count, rows, carry) over all blocks of `steps` steps, in order of time or against it.

    rows are those of read(start, count), asked for while the block before is worked on. The steps that fill no block
    are blocks of 1.
    """
    whole, tail = divmod(length, steps)

    def single(i, carry):
        step = length - 1 - i if backwards else whole * steps + i
        return block(step, 1, read(step, 1), carry)

    def several(i, state):
        carry, rows = state
        at = lambda i: (whole - 1 - i if backwards else i) * steps
        following = read(at(jnp.minimum(i + 1, whole - 1)), steps)
        return block(at(i), steps, rows, carry), following

    if tail and backwards:
        carry = jax.lax.fori_loop(0, tail, single, carry)
    if whole:
        first = read((whole - 1) * steps if backwards else 0, steps)
        carry, _ = jax.lax.fori_loop(0, whole, several, (carry, first))
    if tail and not backwards:
        carry = jax.lax.fori_loop(0, tail, single, carry)
    return carry


def restarts(words: Sequence, start, step: int) -> Callable[[Array, float], Array]:
    """forget(x, empty): x, or `empty` where the row resets at start + step; words: the array of words, if there is."""
    if not words:
        return lambda x, empty: x
    at = jnp.asarray(start + step, jnp.int32)
    bit = (words[0][at >> 5] >> (at & 31)) & 1
    return lambda x, empty: jnp.where(bit != 0, empty, x)
