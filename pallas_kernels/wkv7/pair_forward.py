"""The bfloat16 forward kernel of two heads side by side: passes over a block for `../wkv6/pair_loop.py`.

Rows are those of a and r, columns those of b and k. The inverse of I - <a, b> begins with eighths by substitution, in
float32: 16 of them, 8 by 8, fit into one register. Three rounds of halving (`solve.py`) follow on the matrix unit.
"""

import functools

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
from pallas_kernels.wkv6.pairs import (
    EIGHTHS,
    HALF,
    apart,
    dot,
    packed,
    place,
    registers,
    together,
)
from pallas_kernels.wkv7.pair_inverse import invert, own_eighths, pieces

KINDS = (Rows("a", False), Rows("r", True))
FACTORS = ("own_row", "own_row_present", "own_column", "before", "before_present", "after")
SQUARE = Kept((128, 128), BF16)
ONCE = SQUARE._replace(on=False)
OF_CHUNKS = DECAYS | dict(
    rows=Kept((len(PRODUCTS), 64, 128), BF16), columns=Kept((len(PRODUCTS), 128, 128), BF16),
    before=SQUARE, after=SQUARE, of_a=SQUARE, of_r=SQUARE, eighths=Kept((8, 128), F32), odd=Kept((64, 128), BF16),
    inverse=SQUARE, half_way=SQUARE)
MEMORY = OF_CHUNKS | dict(
    from_v=Kept((64, 128), F32, on=False), read=Kept((64, 128), F32, on=False), wanted=ONCE, added=ONCE)


def passes(block: Block) -> list:
    """What a chunk is by itself; what is removed, y and the state."""
    return [(functools.partial(run, block), at_once) for run, at_once in (*of_chunks(), (_step, 1))]


def of_chunks() -> tuple:
    """(pass, chunks at once) for what needs no state: decays, scaled rows and columns, scores, inverses."""
    return (functools.partial(decays, FACTORS), 1), (_scale, 1), (_score, 1), (_invert, 2)


def _scale(block: Reading, chunk) -> None:
    """Scaled rows and columns, and those for the state, of all pairs of heads."""
    memory, (start, _) = block.memory, block.start(chunk)
    for pair in block.pairs:
        factors, totals = kept_decays(FACTORS, block, chunk, pair)

        def put(name, n, size, product, x, pair=pair):
            memory[name][chunk, pair, product, slice(n * size, (n + 1) * size)] = x

        for n, (name, present) in enumerate(KINDS):
            x = block.read(name, chunk, pair).astype(F32)
            x = registers(x if start is None or present else jnp.where(start > 0, 0, x))
            put_row = functools.partial(put, "rows", n, 32)
            memory["before"][chunk, pair, half(n)] = scale_rows(x, x, present, factors, totals, put_row)
        for n, name in enumerate("bk"):
            x = registers(block.read(name, chunk, pair).astype(F32))
            put_column = functools.partial(put, "columns", n, 64)
            memory["after"][chunk, pair, half(n)] = scale_columns(x, factors, totals, put_column)


def _score(block: Reading, chunk) -> None:
    """Scores of a and r with b and k, and of a's what the inverse begins with, of all pairs of heads."""
    memory, (_, documents) = block.memory, block.start(chunk)
    own = {kind.name: pairs_inside(kind.present, 2, documents) for kind in KINDS}
    for pair in block.pairs:
        out = scores(KINDS, memory["rows"].at(chunk, pair), memory["columns"].at(chunk, pair), own, place(1) % HALF)
        for name in "ar":
            memory["of_" + name][chunk, pair] = packed([out[name, head, q] for head in (0, 1) for q in EIGHTHS])
        a = [out["a", head, q] for head in (0, 1) for q in EIGHTHS]
        memory["eighths"][chunk, pair] = own_eighths(a)
        memory["odd"][chunk, pair] = pieces(a)


def _invert(block: Reading, chunk) -> None:
    """Of two chunks of all pairs of heads."""
    memory = block.memory
    invert([tuple(memory[name].at(chunk + i, pair) for name in ("eighths", "odd", "of_a", "inverse", "half_way"))
            for i in (0, 1) for pair in block.pairs])


def _step(block, chunk):
    """Each product for all pairs before the next: those of one pair wait for each other."""
    memory, pairs = block.memory, block.pairs
    for pair in pairs:
        v = block.read("v", chunk, pair)
        memory["from_v"][chunk, pair] = together(dot("nn", memory["of_a"][chunk, pair],
                                                     jnp.concatenate([jnp.zeros_like(v), v])))
    for pair in pairs:
        read = dot("nt", memory["before"][chunk, pair], block.state(chunk, pair))
        memory["read"][chunk, pair] = read[64:]
        memory["wanted"][chunk, pair] = apart(read[:64] + memory["from_v"][chunk, pair]).astype(BF16)
    for pair in pairs:
        removed = dot("nn", memory["inverse"][chunk, pair], memory["wanted"][chunk, pair])
        memory["added"][chunk, pair, half(0)] = (removed[:64] + removed[64:]).astype(BF16)
        memory["added"][chunk, pair, half(1)] = block.read("v", chunk, pair)
    for pair in pairs:
        block.move(pair, memory["decay"][chunk, pair],
                   dot("tn", memory["added"][chunk, pair], memory["after"][chunk, pair]))
    for pair in pairs:
        inside = dot("nn", memory["of_r"][chunk, pair], memory["added"][chunk, pair])
        block.write(chunk, pair, memory["read"][chunk, pair] + together(inside))


def half(n: int) -> slice:
    """The first or the second 64 rows of two kinds below each other."""
    return slice(64 * n, 64 * n + 64)
