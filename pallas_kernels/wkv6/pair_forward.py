"""The bfloat16 forward kernel of two heads side by side: passes over a block for `pair_loop.py`.

The columns are those of k and, for the bonus of the present position, of u k: the pair i = i of the latter's columns is
r_i (u k_i), as the factors of the row and the column cancel. So one product with v, twice below itself, gives y.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp

from pallas_kernels.wkv6.pair_decays import DECAYS, decays, kept_decays
from pallas_kernels.wkv6.pair_loop import BF16, F32, Block, Kept, Reading
from pallas_kernels.wkv6.pair_scores import (
    PRODUCTS,
    Rows,
    pairs_inside,
    scale_columns,
    scale_rows,
    scores,
)
from pallas_kernels.wkv6.pairs import EIGHTHS, dot, packed, place, registers, together

KINDS = (Rows("r", False),)
FACTORS = ("own_row", "own_column", "own_present_column", "before", "after")
MEMORY = DECAYS | dict(
    rows=Kept((len(PRODUCTS), 32, 128), BF16), columns=Kept((len(PRODUCTS), 128, 128), BF16),
    before=Kept((64, 128), BF16), after=Kept((64, 128), BF16), scores=Kept((128, 128), BF16))


def passes(block: Block) -> list:
    """What a chunk is by itself; y and the state."""
    return [(functools.partial(run, block), 1) for run in (*OF_CHUNKS, _step)]


def _scale(block, chunk):
    memory, (start, _) = block.memory, block.start(chunk)
    for pair in block.pairs:
        def put(name, lanes, product, x, pair=pair):
            memory[name][chunk, pair, product, lanes] = x

        factors, totals = kept_decays(FACTORS, block, chunk, pair)
        r, k = (block.read(name, chunk, pair).astype(F32) for name in "rk")
        bonus = [x * f for x, f in zip(registers(k * block.constant("u", pair)), factors.of("own_present_column"),
                                       strict=True)]
        for product in (0, 1):        # of the others nobody looks at these columns
            put("columns", slice(64, 128), product, packed(bonus))
        past = r if start is None else jnp.where(start > 0, 0, r)
        memory["before"][chunk, pair] = scale_rows(registers(r), registers(past), False, factors, totals,
                                                   functools.partial(put, "rows", slice(None)))
        memory["after"][chunk, pair] = scale_columns(registers(k), factors, totals,
                                                     functools.partial(put, "columns", slice(0, 64)))


def _score(block, chunk):
    memory, own = block.memory, {"r": own_pairs(block, chunk)}
    for pair in block.pairs:
        out = scores(KINDS, memory["rows"].at(chunk, pair), memory["columns"].at(chunk, pair), own, place(1))
        memory["scores"][chunk, pair] = packed([out["r", head, q] for head in (0, 1) for q in EIGHTHS])


def own_pairs(block: Reading, chunk) -> Callable:
    """own of `scores`: j < i, and j = i of the columns of the bonus."""
    inside, present = pairs_inside(False, 1, block.start(chunk)[1]), place(1) - place(0) - 64
    return lambda q: inside(q) | (present == 8 * q)


OF_CHUNKS = functools.partial(decays, FACTORS), _scale, _score       # passes that need no state


def _step(block, chunk):
    memory = block.memory
    for pair in block.pairs:
        v, before = block.read("v", chunk, pair), memory["before"][chunk, pair]
        past = dot("nt", before, block.state(chunk, pair))
        block.move(pair, memory["decay"][chunk, pair], dot("tn", v, memory["after"][chunk, pair]))
        block.write(chunk, pair, past + together(dot("nn", memory["scores"][chunk, pair], jnp.concatenate([v, v]))))
