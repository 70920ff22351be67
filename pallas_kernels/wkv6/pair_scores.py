"""Scores of all pairs of positions of a chunk of 64, two heads at once, for bfloat16: no factor overflows.

With W the running sum of log-decays inside of an eighth (8 positions) and M half of its total, the decays between
positions j < i of one eighth are exp(W_{i-1} - M) exp(M - W_j). A log-decay counts there as at least `WEAKEST`,
e^-16.6, so that no exponent is above 67: inside of an eighth a decay of 0 is one of 6e-8, a float32's rounding error.
Positions of different eighths belong to two halves of a block of 16, 32 or 64: there, and for the state, factors are
products of decays before and after (`halving.py`), of any strength. So that the first eighth of a block of 16 can share
the rows of the second's own, its columns carry exp(M) of the second.

A document's start is a decay of 0 and, inside of an eighth, a mask.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.wkv6.pairs import EIGHTHS, apart_packed, dot, last_rows, packed, place, registers, sums_from_start

Array = jax.Array
LOG2_E = 1.4426950408889634
WEAKEST, NOTHING = -24.0, -160.0          # powers of 2
ODD, EVEN, UPPER_16, UPPER_32 = (1, 3, 5, 7), (0, 2, 4, 6), (2, 3, 6, 7), (4, 5, 6, 7)
PRODUCTS = (ODD, EVEN, UPPER_16, UPPER_32)      # the eighths whose rows each matrix product has


class Rows(NamedTuple):
    """Rows of scores. present: whether the decay of the row's own position counts, and the pair i = i belongs to it."""
    name: str
    present: bool


class Factors:
    """Factors of the positions of a chunk, kept in VMEM: what is named below, a register an eighth."""

    def __init__(self, ref):
        self.ref = ref

    names = ("own_column", "own_row", "own_row_present", "before", "before_present", "after", "own_present_column")

    def of(self, name: str) -> list[Array]:
        start = self.names.index(name)
        return [self.ref[start, 8 * q:8 * q + 8] for q in EIGHTHS]

    def put(self, needed: tuple[str, ...], q: int, **logarithms: Array) -> None:
        """2 to these powers, of those that are needed, for an eighth."""
        for name in filter(needed.__contains__, logarithms):
            self.ref[self.names.index(name), 8 * q:8 * q + 8] = jnp.exp2(logarithms[name])


def fill_factors(w: Array, start: Array | None, factors: Factors, needed: tuple[str, ...], totals) -> None:
    """From log-decays w [64, 128] and 1 where documents start.

    totals gets decays over 0..7: each eighth, 8..11: two, 12 and 13: four; and 14..17: exp(M) of the odd eighths.
    """
    w = w * LOG2_E
    own, hard = jnp.maximum(w, WEAKEST), jnp.maximum(w, NOTHING)
    if start is not None:
        hard = jnp.where(start > 0, NOTHING, hard)
    sums = sums_from_start(own)
    middle = [0.5 * x for x in last_rows(sums)]
    for q, (at, one, half) in enumerate(zip(registers(sums), registers(own), middle, strict=True)):
        at = at - half
        factors.put(needed, q, own_column=-at, own_row=at - one, own_row_present=at, own_present_column=one - at)
    sums = sums_from_start(hard)
    ends = last_rows(sums)
    for q, (at, one, end) in enumerate(zip(registers(sums), registers(hard), ends, strict=True)):
        factors.put(needed, q, before=at - one, before_present=at, after=end - at)
    one = [jnp.exp2(x) for x in ends]
    two = [one[i] * one[i + 1] for i in EVEN]
    for i, x in enumerate([*one, *two, two[0] * two[1], two[2] * two[3], *(jnp.exp2(middle[q]) for q in ODD)]):
        totals[i] = x


def scale_rows(x: list[Array], past: list[Array], present: bool, factors: Factors, totals, put: Callable) -> Array:
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


def scale_columns(x: list[Array], factors: Factors, totals, put: Callable) -> Array:
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
