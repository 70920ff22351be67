"""The bfloat16 backward kernel of two heads side by side: passes over a block for `../wkv6/pair_sweep.py`.

Scores and inverses are those of the forward. The cotangent of the state goes through a chunk by one matrix, which is
made before: so of all products only one waits for the chunk after. The rest is the derivation of the README.
"""

import functools

import jax.numpy as jnp

from pallas_kernels.wkv6.pair_decays import kept_decays
from pallas_kernels.wkv6.pair_gradients import (
    OF_COLUMNS,
    decay_gradient,
    pull_column,
    pull_row,
    put_columns,
    split_products,
    taken_columns,
    taken_rows,
)
from pallas_kernels.wkv6.pair_loop import BF16, F32, Kept
from pallas_kernels.wkv6.pair_scores import PRODUCTS, pairs_inside
from pallas_kernels.wkv6.pair_sweep import Block
from pallas_kernels.wkv6.pairs import (
    HALF,
    apart,
    apart_packed,
    dot,
    joined_packed,
    packed,
    place,
    registers,
    together,
)
from pallas_kernels.wkv7.pair_forward import FACTORS, KINDS, OF_CHUNKS, ONCE, SQUARE, half, of_chunks

MEMORY = OF_CHUNKS | dict(
    # Z and V; the gradients of what a wants and of y; that of the state after the chunk; p beside r's rows
    removed=SQUARE, wanted=SQUARE, cotangent=SQUARE, moved=ONCE, from_v=Kept((64, 128), BF16),
    from_y=Kept((128, 128), F32), matrix=SQUARE, added=Kept((128, 128), F32), moving=ONCE,
    of_rows=Kept((len(PRODUCTS) * 64, 128), F32),
    of_columns=Kept((2 * OF_COLUMNS, 128), F32))
# Where gradients of the rows and columns for the states go, and of decays: what was there before has been read.
OF_BEFORE, OF_AFTER, UNTIL = "added", "from_y", "turned"
STRICT = OF_BEFORE      # an eighth a time, after it was read
OF_PRODUCTS = ("of_a", "of_r", "inverse", "half_way")


def passes(block: Block) -> list:
    """What a chunk is by itself; what the state's cotangent goes through; that cotangent; what is removed and the
    gradient of what is wanted; gradients of scores and of the inputs."""
    return [(functools.partial(run, block), at_once)
            for run, at_once in (*of_chunks(), (_prepare, 1), (_sweep, 1), (_solve, 1), (_products, 1), (_scaled, 1))]


def _prepare(block, chunk):
    """What y and the state's cotangent need not wait for; each product for all pairs before the next."""
    memory, pairs = block.memory, block.pairs
    for pair in pairs:
        v = block.read("v", chunk, pair)
        memory["from_v"][chunk, pair] = together(dot("nn", memory["of_a"][chunk, pair],
                                                     jnp.concatenate([jnp.zeros_like(v), v]))).astype(BF16)
    for pair in pairs:
        from_y = dot("tn", memory["of_r"][chunk, pair], apart_packed(block.read("dy", chunk, pair)))
        memory["from_y"][chunk, pair] = from_y
        memory["moving"][chunk, pair, half(0)] = from_y[:64].astype(BF16)
        memory["moving"][chunk, pair, half(1)] = block.read("dy", chunk, pair)
    for pair in pairs:
        before = memory["before"][chunk, pair]
        moved = together(dot("nn", memory["inverse"][chunk, pair], apart_packed(before[:64])))
        memory["moved"][chunk, pair, half(0)] = moved.astype(BF16)
        memory["moved"][chunk, pair, half(1)] = before[64:]
    for pair in pairs:
        memory["matrix"][chunk, pair] = dot("tn", memory["after"][chunk, pair, half(0)],
                                            memory["moved"][chunk, pair, half(0)]).astype(BF16)
    for pair in pairs:
        memory["added"][chunk, pair] = dot("tn", memory["moving"][chunk, pair], memory["moved"][chunk, pair])


def _sweep(block, chunk):
    memory, left = block.memory, place(1) < HALF
    for pair in block.pairs:
        memory["cotangent"][chunk, pair] = packed([
            jnp.where(left == (i < 8), x, 0) for i, x in enumerate(registers(block.cotangent(pair)))])
    for pair in block.pairs:
        through = dot("nn", memory["cotangent"][chunk, pair], memory["matrix"][chunk, pair])
        block.move(pair, memory["decay"][chunk, pair], through + memory["added"][chunk, pair])


def _solve(block, chunk):
    """Z, the gradients of what a wants, and dv."""
    memory, pairs = block.memory, block.pairs
    for pair in pairs:
        read = dot("nt", memory["before"][chunk, pair, half(0)], block.state(chunk, pair))
        memory["moving"][chunk, pair] = apart(read + memory["from_v"][chunk, pair].astype(F32)).astype(BF16)
    for pair in pairs:
        removed = dot("nn", memory["inverse"][chunk, pair], memory["moving"][chunk, pair])
        memory["removed"][chunk, pair, half(0)] = (removed[:64] + removed[64:]).astype(BF16)
        memory["removed"][chunk, pair, half(1)] = block.read("v", chunk, pair)
    for pair in pairs:
        read = dot("nt", memory["after"][chunk, pair], memory["cotangent"][chunk, pair])
        memory["from_y"][chunk, pair] = memory["from_y"][chunk, pair] + read
        memory["moving"][chunk, pair] = apart(memory["from_y"][chunk, pair, half(0)]).astype(BF16)
    for pair in pairs:
        wanted = dot("tn", memory["inverse"][chunk, pair], memory["moving"][chunk, pair])
        memory["moving"][chunk, pair] = wanted.astype(BF16)
        memory["wanted"][chunk, pair, half(0)] = (wanted[:64] + wanted[64:]).astype(BF16)
        memory["wanted"][chunk, pair, half(1)] = block.read("dy", chunk, pair)
    for pair in pairs:
        dv = dot("tn", memory["of_a"][chunk, pair], memory["moving"][chunk, pair])
        block.write("v", chunk, pair, dv[64:] + memory["from_y"][chunk, pair, half(1)])


def _products(block, chunk):
    """Gradients of scores, and of the rows and columns that products took."""
    memory, (_, documents) = block.memory, block.start(chunk)

    def put(n, pair, product, head, x):
        memory[OF_PRODUCTS[product]][chunk, pair, slice(64 * head + 32 * n, 64 * head + 32 * n + 32)] = x

    for pair in block.pairs:
        removed = memory["removed"][chunk, pair]
        for n, kind in enumerate(KINDS):
            scores = registers(dot("nt", apart_packed(memory["wanted"][chunk, pair, half(n)]), removed))
            for head in (0, 1):
                split_products(scores[8 * head:8 * head + 8], pairs_inside(kind.present, 2, documents), place(1) % HALF,
                               functools.partial(put, n, pair, head=head))
    for pair in block.pairs:
        removed, cotangent = memory["removed"][chunk, pair], memory["cotangent"][chunk, pair]
        for product in range(len(PRODUCTS)):
            x = memory[OF_PRODUCTS[product]][chunk, pair]
            of_rows = together(dot("nn", x, memory["columns"][chunk, pair, product]))
            memory["of_rows"][chunk, pair, slice(64 * product, 64 * product + 64)] = of_rows
            of_columns = registers(dot("tn", x, apart_packed(memory["rows"][chunk, pair, product])))
            for n in (0, 1):
                put_columns(of_columns[8 * n:8 * n + 8], product, memory["of_columns"].at(chunk, pair), OF_COLUMNS * n)
        memory[OF_BEFORE][chunk, pair] = dot("nn", memory["wanted"][chunk, pair], block.state(chunk, pair))
        memory[OF_AFTER][chunk, pair] = dot("nn", removed, cotangent)


def _scaled(block, chunk):
    """Gradients of the inputs but v from those: another pass, as for `decays`."""
    for pair in block.pairs:
        _scaled_pair(block, pair, chunk)


def _scaled_pair(block, pair, chunk):
    memory, (start, _) = block.memory, block.start(chunk)
    factors, totals = kept_decays(FACTORS, block, chunk, pair)
    at = lambda *names: [memory[name].at(chunk, pair) for name in names]
    rows = [taken_rows(*at("rows", "of_rows", "before", OF_BEFORE), n, 2) for n in (0, 1)]
    columns = [taken_columns(*at("columns", "of_columns", "after", OF_AFTER), n) for n in (0, 1)]
    cotangent = joined_packed(memory["cotangent"][chunk, pair]).astype(F32)
    whole = memory["decay"][chunk, pair] * sum(registers(block.saved(chunk, pair).astype(F32) * cotangent))
    for tile in range(4):
        got = {name: [] for name in "arbk"}
        for q in (2 * tile, 2 * tile + 1):
            until, strict = [], None
            for (name, present), of in zip(KINDS, rows, strict=True):
                dx, ends = pull_row(q, of, present, factors, totals)
                got[name].append(dx)
                until.append(ends)
                strict = strict if present else ends
            for name, of in zip("bk", columns, strict=True):
                dx, ends, of_state = pull_column(q, of, factors, totals)
                got[name].append(dx)
                until.append(-ends)
                whole = whole + of_state
            memory[UNTIL][chunk, pair, slice(8 * q, 8 * q + 8)] = sum(until)
            memory[STRICT][chunk, pair, slice(8 * q, 8 * q + 8)] = strict
        for name, parts in got.items():
            x = jnp.concatenate(parts)
            if name == "a" and start is not None:
                x = jnp.where(start[16 * tile:16 * tile + 16] > 0, 0, x)
            block.write(name, chunk, pair, x, 16 * tile)
    ends = (memory[name][chunk, pair, half(0)] for name in (UNTIL, STRICT))
    block.write("w", chunk, pair, decay_gradient(block.read("w", chunk, pair), start, *ends, whole))
