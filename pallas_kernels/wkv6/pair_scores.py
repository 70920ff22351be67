"""Scores of all pairs of positions of a chunk of 64, two heads at once, for bfloat16: no factor overflows.

With W the running sum of log-decays inside of an eighth (8 positions) and M half of its total, the decays between
positions j < i of one eighth are exp(W_{i-1} - M) exp(M - W_j). A log-decay counts there as at least `WEAKEST`,
e^-16.6, so that no exponent is above 67: inside of an eighth a decay of 0 is one of 6e-8, a float32's rounding error.
Positions of different eighths belong to two halves of a block of 16, 32 or 64: there, and for the state, factors are
products of decays before and after (`halving.py`), of any strength. So that the first eighth of a block of 16 can share
the rows of the second's own, its columns carry exp(M) of the second.

A document's start is a decay of 0 and, inside of an eighth, a mask.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.wkv6.pairs import EIGHTHS, REGISTER, apart_packed, dot, packed, place, registers

Array = jax.Array
LOG2_E = 1.4426950408889634
WEAKEST, NOTHING = -24.0, -160.0          # powers of 2
ODD, EVEN, UPPER_16, UPPER_32 = (1, 3, 5, 7), (0, 2, 4, 6), (2, 3, 6, 7), (4, 5, 6, 7)
PRODUCTS = (ODD, EVEN, UPPER_16, UPPER_32)      # the eighths whose rows each matrix product has


class Rows(NamedTuple):
    """Rows of scores. present: whether the decay of the row's own position counts, and the pair i = i belongs to it."""
    name: str
    present: bool


# Where factors are: in which series of nine registers, and after how many of them. With the decay of its own position a
# factor is that of the next position without.
_SERIES = dict(own_row=(0, 0), own_row_present=(0, 1), own_present_column=(1, 0), own_column=(1, 1), before=(2, 0),
               before_present=(2, 1), after=(3, 1))


_FIRST = (0, 9, 18, 26)       # registers before each; the last series has none for j = 0


class Factors:
    """Factors of the positions of a chunk, kept in VMEM in the order of `across_eighths`: those that are named."""
    shape = (35 * 8, 128)

    def __init__(self, names: tuple[str, ...], ref):
        self.ref = ref
        self.needed = {(series, after + j) for series, after in map(_SERIES.get, names) for j in EIGHTHS}

    def of(self, name: str) -> list[Array]:
        return [self.at(name, q) for q in EIGHTHS]

    def at(self, name: str, q: int) -> Array:
        """Those of an eighth."""
        series, after = _SERIES[name]
        return self.ref[pl.ds(8 * (_FIRST[series] + after) + q, 8, stride=8)]

    def fill(self, j: int, *series: Array) -> None:
        """The j-th registers of all series: what is needed of them."""
        for i, x in enumerate(series):
            if (i, j) in self.needed:
                self.ref[8 * (_FIRST[i] + j):8 * (_FIRST[i] + j) + 8] = x


class Totals:
    """Decays over whole eighths and more of them, kept in VMEM: an eighth a row, and what all its positions have.

    0..7: over each eighth, 8..11: two, 12 and 13: four; and 14..17: exp(M) of the odd eighths.
    """
    shape = (4, 8, 128)

    def __init__(self, ref):
        self.ref = ref

    def fill(self, over: Array, middle: Array) -> None:
        two = over * pltpu.roll(over, 7, 0)
        for i, x in enumerate((over, two, two * pltpu.roll(two, 6, 0), middle)):
            self.ref[i] = x

    def __getitem__(self, i: int) -> Array:
        kind, q = next((kind, (i - first) * step + odd) for kind, first, step, odd in
                       ((3, 14, 2, 1), (2, 12, 4, 0), (1, 8, 2, 0), (0, 0, 1, 0)) if i >= first)
        return jnp.broadcast_to(self.ref[kind, q:q + 1], REGISTER)


def fill_factors(w: Array, starts: list[Array] | None, factors: Factors, totals: Totals, turned, later) -> None:
    """From log-decays w [64, 128] and 1 where documents start, in the order of `across_eighths`; turned: [64, 128] of
    VMEM for the former, and later the same to load from (`PerPair.later`). So sums over an eighth are of registers."""
    turned[...] = w * LOG2_E
    w = [later[here] for here in across_eighths(0)]
    own = _sums([jnp.maximum(x, WEAKEST) for x in w])
    w = [jnp.maximum(x, NOTHING) for x in w]
    if starts is not None:
        w = [jnp.where(start > 0, NOTHING, x) for start, x in zip(starts, w, strict=True)]
    hard = _sums(w)
    half = 0.5 * own[8]
    for j, (x, y) in enumerate(zip(own, hard, strict=True)):
        factors.fill(j, jnp.exp2(x - half), jnp.exp2(half - x), jnp.exp2(y), jnp.exp2(hard[8] - y))
    totals.fill(jnp.exp2(hard[8]), jnp.exp2(half))


def across_eighths(start) -> list:
    """Rows of a chunk that begins at `start`: the j-th positions of all eighths, for each j."""
    return [pl.ds(start + j, 8, stride=8) for j in EIGHTHS]


def _sums(x: list[Array]) -> list[Array]:
    """0 and the running sums."""
    return list(itertools.accumulate(x, initial=jnp.zeros_like(x[0])))


def scale_rows(x: list[Array], past: list[Array], present: bool, factors: Factors, totals: Totals,
               put: Callable) -> Array:
    """put(product, [32, 128]) for the four products; returns rows [64, 128] for the state before the chunk.

    past: x where it meets what is before its eighth or the one before.
    """
    own = [a * b for a, b in zip(x, factors.of("own_row_present" if present else "own_row"), strict=True)]
    put(0, packed([own[q] for q in ODD]))
    put(1, packed([own[q] for q in EVEN]))
    own = [a * b for a, b in zip(past, factors.of("before_present" if present else "before"), strict=True)]
    sixteen = {2: own[2], 3: own[3] * totals[2], 6: own[6], 7: own[7] * totals[6]}
    half = {4: own[4], 5: own[5] * totals[4], 6: sixteen[6] * totals[10], 7: sixteen[7] * totals[10]}
    put(2, packed([sixteen[q] for q in UPPER_16]))
    put(3, packed([half[q] for q in UPPER_32]))
    return packed([own[0], own[1] * totals[0], sixteen[2] * totals[8], sixteen[3] * totals[8],
                   *(half[q] * totals[12] for q in UPPER_32)])


def scale_columns(x: list[Array], factors: Factors, totals: Totals, put: Callable) -> Array:
    """put(product, [64, 128]) for the four products; returns columns [64, 128] for the state after the chunk."""
    own = [a * b for a, b in zip(x, factors.of("own_column"), strict=True)]
    after = [a * b for a, b in zip(x, factors.of("after"), strict=True)]
    put(0, packed([own[q] if q % 2 else after[q] * totals[14 + q // 2] for q in EIGHTHS]))
    put(1, packed(own))
    sixteen = {0: after[0] * totals[1], 1: after[1], 4: after[4] * totals[5], 5: after[5]}
    half = {0: sixteen[0] * totals[9], 1: sixteen[1] * totals[9], 2: after[2] * totals[3], 3: after[3]}
    put(2, packed([sixteen.get(q, after[q]) for q in EIGHTHS]))
    put(3, packed([half.get(q, after[q]) for q in EIGHTHS]))
    return packed([*(half[q] * totals[13] for q in range(4)), sixteen[4] * totals[11], sixteen[5] * totals[11],
                   after[6] * totals[7], after[7]])


def scores(kinds: tuple[Rows, ...], rows, columns, own: Mapping[str, Callable], lane: Array) -> dict:
    """{(name, head, eighth): [8, 128]} of the products' rows and columns; own[name](q): which lanes are pairs inside of
    the eighth, or of the one before where q is odd; lane: the lane's column, beyond 64 where it is not of the past."""
    out, count = {}, len(kinds)

    def row(product, head, n, q):
        return got[product][(head * count + n) * 4 + PRODUCTS[product].index(q)]

    got = [registers(dot("nt", apart_packed(rows[i]), columns[i])) for i in (3, 2, 1, 0)][::-1]
    for head in (0, 1):
        for n, kind in enumerate(kinds):
            for q in EIGHTHS:
                x = jnp.where(own[kind.name](q), row(1 - q % 2, head, n, q), 0)
                if q in (2, 3):
                    x = jnp.where(lane < 16, row(2, head, n, q), x)
                elif q in (4, 5):
                    x = jnp.where(lane < 32, row(3, head, n, q), x)
                elif q in (6, 7):
                    x = jnp.where(lane < 48, jnp.where(lane < 32, row(3, head, n, q), row(2, head, n, q)), x)
                out[kind.name, head, q] = x
    return out


def pairs_inside(present: bool, columns: int, documents: Array | None) -> Callable:
    """own of `scores` for rows of 64 columns, `columns` times: j < i, or j <= i where present, of one document.

    documents [64, 128]: the number of starts until each position, in all lanes.
    """
    past = place(1) % (128 // columns) - place(0)
    if documents is None:
        return lambda q: past < 8 * q + present
    along = jnp.concatenate([documents] * 2).T[:8]
    return lambda q: (past < 8 * q + present) & (along == documents[8 * q:8 * q + 8])
