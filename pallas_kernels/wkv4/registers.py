"""[B, T, C] blocks turned so that a register holds one step of 8 rows, without a copy in HBM.

In memory time lies on sublanes. Here a row is a batch row, or a group of 128 channels of one where the batch has fewer
than 8. Eight registers, one a row with 8 steps on its sublanes, become eight, one a step with 8 rows: a transpose of
8 x 8 sublanes in three rounds. bfloat16 steps go in pairs, as the int32 that they lie in, so 16 steps cost as 8 do.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.wkv4.config import LANES, SUBLANES, Tiles

Array = jax.Array


def steps_turned(dtype) -> int:
    """Steps that are turned together."""
    return SUBLANES * 4 // jnp.dtype(dtype).itemsize


def turn_in(ref, tiles: Tiles, start, chain, turned) -> None:
    """Fills `turned`, eight registers [rows, 128], with the steps from `start` of one chain of channels."""
    num = steps_turned(ref.dtype)
    rows = [ref[row, pl.ds(start, num), lanes] for row, lanes in _places(tiles, chain)]
    for i, x in enumerate(turn([pltpu.bitcast(x, jnp.int32) if ref.dtype == jnp.bfloat16 else x for x in rows])):
        turned[i] = x


def turn_out(turned, tiles: Tiles, start, chain, ref) -> None:
    """The opposite of `turn_in`."""
    num = steps_turned(ref.dtype)
    for (row, lanes), x in zip(_places(tiles, chain), turn([turned[i] for i in range(SUBLANES)]), strict=True):
        ref[row, pl.ds(start, num), lanes] = pltpu.bitcast(x, ref.dtype) if ref.dtype == jnp.bfloat16 else x


def steps_in(x: Array) -> list[Array]:
    """The steps in a turned register, in float32."""
    if x.dtype == jnp.float32:
        return [x]
    return [pltpu.bitcast(bits, jnp.float32) for bits in (x << 16, x & jnp.int32(-65536))]


def joined(steps: list[Array]) -> Array:
    """The opposite of `steps_in`."""
    if len(steps) == 1:
        return steps[0]
    return pltpu.bitcast(pltpu.pack_elementwise(steps, packed_dtype=jnp.bfloat16), jnp.int32)


def turn(registers: list[Array]) -> list[Array]:
    """Sublane i of register j becomes sublane j of register i."""
    out, sublane = list(registers), jax.lax.broadcasted_iota(jnp.int32, registers[0].shape, 0)
    for distance in (4, 2, 1):
        first = (sublane & distance) == 0
        for i in range(SUBLANES):
            if not i & distance:
                x, y = out[i], out[i + distance]
                out[i] = jnp.where(first, x, pltpu.roll(y, distance, 0))
                out[i + distance] = jnp.where(first, pltpu.roll(x, SUBLANES - distance, 0), y)
    return out


def load_rows(ref, tiles: Tiles, index: int, chain: int) -> Array:
    """One register of a [B, n, C] block: row `index` of its second axis."""
    if tiles.groups == 1:
        return ref[:, index, pl.ds(chain * LANES, LANES)]
    return jnp.concatenate([ref[row, index:index + 1, lanes] for row, lanes in _places(tiles, chain)])


def store_rows(ref, tiles: Tiles, index: int, chain: int, x: Array) -> None:
    """The opposite of `load_rows`."""
    if tiles.groups == 1:
        ref[:, index, pl.ds(chain * LANES, LANES)] = x
        return
    for i, (row, lanes) in enumerate(_places(tiles, chain)):
        ref[row, index:index + 1, lanes] = x[i:i + 1]


def _places(tiles: Tiles, chain) -> list[tuple[int, object]]:
    """(batch row, lanes) of each of the 8 rows of a chain, a Python int or a loop's index."""
    start = lambda group: (chain * tiles.groups + group) * LANES
    lanes = lambda group: (slice(start(group), start(group) + LANES) if isinstance(chain, int)
                           else pl.ds(pl.multiple_of(start(group), LANES), LANES))
    return [(row, lanes(group)) for row in range(tiles.rows) for group in range(tiles.groups)]
