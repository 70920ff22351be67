"""The bfloat16 backward kernel of two heads side by side: passes over a block for `pair_sweep.py`.

Scores are those of the forward, of k's columns and of the bonus's, and so are the ways back through them. The cotangent
of the state waits for no product of the chunk after.
"""

import functools

import jax.numpy as jnp

from pallas_kernels.wkv6.pair_decays import kept_decays
from pallas_kernels.wkv6.pair_forward import FACTORS, OF_CHUNKS, own_pairs
from pallas_kernels.wkv6.pair_forward import MEMORY as FORWARD
from pallas_kernels.wkv6.pair_gradients import (
    OF_COLUMNS,
    Taken,
    decay_gradient,
    pull_column,
    pull_own,
    pull_row,
    put_columns,
    split_products,
    taken_columns,
    taken_rows,
)
from pallas_kernels.wkv6.pair_loop import BF16, F32, Kept
from pallas_kernels.wkv6.pair_scores import PRODUCTS
from pallas_kernels.wkv6.pair_sweep import Block
from pallas_kernels.wkv6.pairs import (
    EIGHTHS,
    HALF,
    apart_packed,
    dot,
    joined_packed,
    packed,
    place,
    registers,
    together,
)

ONCE = functools.partial(Kept, dtype=F32, on=False)
MEMORY = FORWARD | dict(
    cotangent=Kept((128, 128), BF16), products=Kept((len(PRODUCTS), 64, 128), BF16, on=False),
    of_rows=ONCE((len(PRODUCTS) * 32, 128)), of_columns=ONCE((OF_COLUMNS + 64, 128)), of_before=ONCE((64, 128)),
    of_after=ONCE((64, 128)), until=ONCE((64, 128)), strict=ONCE((64, 128)))


def passes(block: Block) -> list:
    """What a chunk is by itself; the state's cotangent; gradients of scores and of the inputs."""
    return [(functools.partial(run, block), 1) for run in (*OF_CHUNKS, _sweep, _pull)]


def _sweep(block, chunk):
    memory, left = block.memory, place(1) < HALF
    for pair in block.pairs:
        memory["cotangent"][chunk, pair] = packed([
            jnp.where(left == (i < 8), x, 0) for i, x in enumerate(registers(block.cotangent(pair)))])
    for pair in block.pairs:
        added = dot("tn", block.read("dy", chunk, pair), memory["before"][chunk, pair])
        block.move(pair, memory["decay"][chunk, pair], added)


def _pull(block, chunk):
    """Gradients of scores, of the rows and columns that products took, and of the inputs: the vector unit's part of a
    pair of heads beside the matrix unit's of the next."""
    memory, own = block.memory, own_pairs(block, chunk)

    def put(pair, product, head, x):
        memory["products"][chunk, pair, product, slice(32 * head, 32 * head + 32)] = x

    for pair in block.pairs:
        v, dy = block.read("v", chunk, pair), block.read("dy", chunk, pair)
        scores = registers(dot("nt", apart_packed(dy), jnp.concatenate([v, v])))
        for head in (0, 1):
            split_products(scores[8 * head:8 * head + 8], own, place(1), functools.partial(put, pair, head=head))
    for pair in block.pairs:
        if pair:
            _scaled(block, pair - 1, chunk)
        v, dy, cotangent = block.read("v", chunk, pair), block.read("dy", chunk, pair), memory["cotangent"][chunk, pair]
        for product in range(len(PRODUCTS)):
            count = 128 if product < 2 else 64          # the bonus has columns in the first two
            x = memory["products"][chunk, pair, product][:, :count]
            of_rows = together(dot("nn", x, memory["columns"][chunk, pair, product, slice(0, count)]))
            memory["of_rows"][chunk, pair, slice(32 * product, 32 * product + 32)] = of_rows
            of_columns = registers(dot("tn", x, apart_packed(memory["rows"][chunk, pair, product])))
            put_columns(of_columns[:8], product, memory["of_columns"].at(chunk, pair), 0)
            for q in EIGHTHS if product < 2 else ():
                if q % 2 != product:
                    memory["of_columns"][chunk, pair, _of_bonus(q)] = of_columns[8 + q]
        of_v = dot("tn", memory["scores"][chunk, pair], apart_packed(dy))
        block.write("v", chunk, pair, of_v[:64] + of_v[64:] + dot("nt", memory["after"][chunk, pair], cotangent))
        memory["of_before"][chunk, pair] = dot("nn", dy, block.state(chunk, pair))
        memory["of_after"][chunk, pair] = dot("nn", v, cotangent)
    _scaled(block, block.pairs[-1], chunk)


def _of_bonus(q: int) -> slice:
    return slice(OF_COLUMNS + 8 * q, OF_COLUMNS + 8 * q + 8)


def _scaled(block, pair, chunk):
    """Gradients of the inputs but v from those, of one pair of heads."""
    memory, (start, _) = block.memory, block.start(chunk)
    factors, totals = kept_decays(FACTORS, block, chunk, pair)
    at = lambda *names: [memory[name].later(chunk, pair) for name in names]
    rows = taken_rows(*at("rows", "of_rows", "before", "of_before"), 0, 1)
    columns = taken_columns(*at("columns", "of_columns", "after", "of_after"), 0)
    taken, of_columns = at("columns", "of_columns")
    bonus = [Taken(taken.at[i], EIGHTHS, 64, of_columns, EIGHTHS, OF_COLUMNS) for i in (0, 1)]
    cotangent = joined_packed(memory["cotangent"][chunk, pair]).astype(F32)
    whole = memory["decay"][chunk, pair] * sum(registers(block.saved(chunk, pair).astype(F32) * cotangent))
    u, of_u = block.constant("u", pair), 0
    for tile in range(4):
        k = registers(block.read("k", chunk, pair)[16 * tile:16 * tile + 16].astype(F32))
        dr, dk = [], []
        for n, q in enumerate((2 * tile, 2 * tile + 1)):
            here = slice(8 * q, 8 * q + 8)
            dx, of_row = pull_row(q, rows, False, factors, totals, None if start is None else start[here])
            dr.append(dx)
            dx, of_column, of_state = pull_column(q, columns, factors, totals)
            whole = whole + of_state
            of_bonus, ends = pull_own(q, bonus, "own_present_column", factors)
            dk.append(dx + u * of_bonus)
            of_u = of_u + k[n] * of_bonus
            memory["until"][chunk, pair, here] = of_row - of_column - ends
            memory["strict"][chunk, pair, here] = of_row - ends
        for name, parts in (("r", dr), ("k", dk)):
            block.write(name, chunk, pair, jnp.concatenate(parts), 16 * tile)
    block.add("u", pair, of_u)
    block.write("w", chunk, pair, decay_gradient(block.read("w", chunk, pair), start,
                                                 *(x[...] for x in at("until", "strict")), whole))
