"""(I - a)^-1 of two heads' scores in a chunk of 64, for `pair_forward.py`: `solve.py` begun with eighths.

a comes as 16 registers, eighths of the first head and then of the second, with the columns of b in lanes 0..63.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.wkv6.pairs import HALF, dot, packed, place, registers

Array = jax.Array
TILES = tuple((head, at) for head in (0, 1) for at in range(4))         # 16 rows each: one register of bfloat16


def own_eighths(a: list[Array]) -> Array:
    """[8, 128]: the 8 by 8 blocks on the diagonals of both heads, side by side."""
    group, both = place(1) >> 3, []
    for head in (0, 1):
        out = a[8 * head]
        for q in range(1, 8):
            out = jnp.where(group == q, a[8 * head + q], out)
        both.append(out)
    return jnp.where(place(1) < HALF, both[0], pltpu.roll(both[1], HALF, 1))


def pieces(a: list[Array]) -> Array:
    """[64, 128]: of the odd eighths' rows what lies left of their own block; the second head's in the right lanes."""
    group = place(1) >> 3
    left = [jnp.where(group == q - 1, a[8 * head + q], 0) for head in (0, 1) for q in (1, 3, 5, 7)]
    return packed(left[:4] + [pltpu.roll(x, HALF, 1) for x in left[4:]])


def invert(arrays: list[tuple]) -> None:
    """For each (eighths, pieces, scores of a, inverse, scratch), refs: fill inverse [128, 128], block-diagonal.

    One step of all before the next: the products of one wait for each other.
    """
    row, lane = place(0), place(1)
    group = lane >> 3
    eighths = [refs[0][...] for refs in arrays]
    inverses = [jnp.where((lane & 7) == row, 1.0, 0.0) for _ in arrays]
    for j in range(7):
        columns = [jnp.take_along_axis(a, (lane & ~7) + j, axis=1) for a in eighths]
        inverses = [x + column * jnp.broadcast_to(x[j:j + 1], x.shape)
                    for x, column in zip(inverses, columns, strict=True)]
    own = lambda x, q: jnp.where(group == q, x, 0)
    one = lambda row_of, x: jnp.where(lane - row == row_of, 1.0, x)
    products = [registers(dot("nn", refs[1][...], packed([own(x, q) for q in range(16)])))
                for refs, x in zip(arrays, inverses, strict=True)]
    below = [packed([part for i, y in enumerate(product) for part in (one(16 * i, 0.0), one(16 * i + 8, y))])
             for product in products]
    products = [registers(dot("nn", packed([own(x, q) for q in range(1, 16, 2)]), y))
                for x, y in zip(inverses, below, strict=True)]
    for refs, x, product in zip(arrays, inverses, products, strict=True):
        for i, y in enumerate(product):
            refs[3][16 * i:16 * i + 16] = packed([own(x, 2 * i), y])
    for refs in arrays:
        refs[4][...] = jnp.zeros(refs[4].shape, refs[4].dtype)
    _double(arrays, [tile for tile in TILES if tile[1] & 1], lambda head, at: (lane >> 4) == 4 * head + at - 1)
    _double(arrays, [tile for tile in TILES if tile[1] & 2], lambda head, at: (lane >> 5) == 2 * head)


def _double(arrays, tiles, left) -> None:
    """Inverses of blocks of twice the size: X_2 (a_21 X_1) below those of both; tiles: rows of the second halves; left:
    their lanes in the first half. Rows of the first halves of the scratch count for nothing and have to be finite."""
    row, lane = place(0), place(1)
    at = [slice(16 * (4 * head + tile), 16 * (4 * head + tile) + 16) for head, tile in tiles]

    def below(a, head, here):
        bits = pltpu.bitcast(a[here], jnp.int32)
        return pltpu.roll(bits, HALF, 1) if head else bits

    rows = [jnp.concatenate([pltpu.bitcast(jnp.where(left(*tile), below(refs[2], tile[0], here), 0), jnp.bfloat16)
                             for tile, here in zip(tiles, at, strict=True)]) for refs in arrays]
    products = [dot("nn", x, refs[3][...]) for x, refs in zip(rows, arrays, strict=True)]
    for refs, product in zip(arrays, products, strict=True):
        for i, here in enumerate(at):
            # The identity besides: the second product then has X_2 itself as well.
            parts = [jnp.where(lane - row == here.start + more, 1.0, product[16 * i + more:16 * i + more + 8])
                     for more in (0, 8)]
            refs[4][here] = packed(parts)
    products = [dot("nn", jnp.concatenate([refs[3][here] for here in at]), refs[4][...]) for refs in arrays]
    for refs, product in zip(arrays, products, strict=True):
        for i, here in enumerate(at):
            refs[3][here] = product[16 * i:16 * i + 16].astype(jnp.bfloat16)
