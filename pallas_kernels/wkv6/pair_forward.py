"""The bfloat16 forward kernel of two heads side by side: passes over a block for `pair_loop.py`.

The columns are those of k and, for the bonus of the present position, of u k: the pair i = i of the latter's columns is
r_i (u k_i), as the factors of the row and the column cancel. So one product with v, twice below itself, gives y.
"""

import functools

import jax.numpy as jnp

from pallas_kernels.wkv6.pair_loop import BF16, F32, Block, Kept
from pallas_kernels.wkv6.pair_scores import (
    PRODUCTS,
    Factors,
    Rows,
    fill_factors,
    pairs_inside,
    scale_columns,
    scale_rows,
    scores,
)
from pallas_kernels.wkv6.pairs import EIGHTHS, dot, packed, place, registers, together

KINDS = (Rows("r", False),)
FACTORS = ("own_row", "own_column", "own_present_column", "before", "after")
MEMORY = dict(
    factors=Kept((len(Factors.names), 64, 128), F32, on=False), totals=Kept((18, 8, 128), F32, on=False),
    decay=Kept((8, 128), F32), rows=Kept((len(PRODUCTS), 32, 128), BF16), columns=Kept((len(PRODUCTS), 128, 128), BF16),
    before=Kept((64, 128), BF16), after=Kept((64, 128), BF16), scores=Kept((128, 128), BF16))


def passes(block: Block) -> list:
    """Factors with scaled rows and columns, a pair of heads after the other; scores; y and the state."""
    return [*((functools.partial(_scale, block, pair), 1) for pair in block.pairs),
            *((functools.partial(run, block), 1) for run in (_score, _step))]


def _scale(block, pair, chunk):
    memory = block.memory

    def put(name, lanes, product, x):
        memory[name][chunk, pair, product, lanes] = x

    factors, totals = Factors(memory["factors"].at(chunk, pair)), memory["totals"].at(chunk, pair)
    r, k = (block.read(name, chunk, pair).astype(F32) for name in "rk")
    start, _ = block.start(chunk)
    fill_factors(block.read("w", chunk, pair), start, factors, FACTORS, totals)
    memory["decay"][chunk, pair] = totals[12] * totals[13]
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
    memory, (_, documents) = block.memory, block.start(chunk)
    inside = pairs_inside(False, 1, documents)
    lane, present = place(1), place(1) - place(0) - 64
    own = {"r": lambda q: inside(q) | (present == 8 * q)}
    for pair in block.pairs:
        out = scores(KINDS, memory["rows"].at(chunk, pair), memory["columns"].at(chunk, pair), own, lane)
        memory["scores"][chunk, pair] = packed([out["r", head, q] for head in (0, 1) for q in EIGHTHS])


def _step(block, chunk):
    memory = block.memory
    for pair in block.pairs:
        v, before = block.read("v", chunk, pair), memory["before"][chunk, pair]
        past = dot("nt", before, block.state(chunk, pair))
        block.move(pair, memory["decay"][chunk, pair], dot("tn", v, memory["after"][chunk, pair]))
        block.write(chunk, pair, past + together(dot("nn", memory["scores"][chunk, pair], jnp.concatenate([v, v]))))
