"""The transpose of `pair_scores.py`: gradients of rows, columns and decays from those of all pairs' scores.

The score of a pair is a row's element times a column's, summed over the keys, times the decays between. Through it a
decay at t receives (row element) (column element) (gradient of the score) of every pair that it is between: the sum
over the rows after t of row ∘ drow, less that over the columns from t on of column ∘ dcolumn, as pairs with both after
t are in both. They cancel to float32's rounding: rows and columns are taken here as the products took them, rounded to
bfloat16, and so both sums have the same terms. No factor is divided by.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.wkv6.pair_scores import LOG2_E, PRODUCTS, UPPER_16, UPPER_32, Factors, Totals
from pallas_kernels.wkv6.pairs import EIGHTHS, REGISTER, packed, registers, sums_to_end

Array = jax.Array
FORGETS = -126.0            # a decay of 2 to this is taken as 0 here


def split_products(scores: list[Array], inside: Callable, lane: Array, put: Callable) -> None:
    """put(product, [32, 128] in bfloat16): gradients of what each product made of rows of one kind and head, from those
    of its scores, eight [8, 128]; inside and lane: as own and lane of `pair_scores.scores`."""
    for product, eighths in enumerate(PRODUCTS):
        keep = {0: lambda q: inside(q) & (lane >= 8 * (q - 1)), 1: lambda q: inside(q) & (lane >= 8 * q),
                2: lambda q: (lane < 16) if q < 4 else (lane >= 32) & (lane < 48), 3: lambda q: lane < 32}[product]
        put(product, x=packed([jnp.where(keep(q), scores[q], 0) for q in eighths]))


class Taken(NamedTuple):
    """What a product took, in bfloat16, and its gradient in float32: refs, the eighths in them, and their first row."""
    value: object
    eighths: tuple[int, ...]
    start: int
    gradient: object
    gradient_eighths: tuple[int, ...]
    gradient_start: int

    def at(self, q: int) -> tuple[Array, Array]:
        """(gradient, value ∘ gradient) of an eighth."""
        row = self.gradient_start + 8 * self.gradient_eighths.index(q)
        gradient = self.gradient[row:row + 8]
        row = self.start + 8 * self.eighths.index(q)
        tile, upper = row // 16 * 16, row % 16
        return gradient, self.value[tile:tile + 16].astype(jnp.float32)[upper:upper + 8] * gradient


def taken_rows(rows, of_rows, before, of_before, n: int, kinds: int) -> list[Taken]:
    """Of the n-th kind of rows: what the products took, and the rows for the state. Refs: of_rows has the products of
    all kinds below each other."""
    size = 32 * kinds
    return [*(Taken(rows.at[i], eighths, 32 * n, of_rows, eighths, size * i + 32 * n)
              for i, eighths in enumerate(PRODUCTS)), Taken(before, EIGHTHS, 64 * n, of_before, EIGHTHS, 64 * n)]


COLUMNS = (tuple(EIGHTHS), (0, 2, 4, 6), (0, 1, 4, 5), (0, 1, 2, 3))      # eighths of a product's columns that count
OF_COLUMNS = 8 * sum(map(len, COLUMNS))


def put_columns(gradients: list[Array], product: int, ref, start: int) -> None:
    """Keep what counts of the gradients of one kind's columns, eight [8, 128], in ref from row `start` on."""
    start += 8 * sum(map(len, COLUMNS[:product]))
    for i, q in enumerate(COLUMNS[product]):
        ref[start + 8 * i:start + 8 * i + 8] = gradients[q]


def taken_columns(columns, of_columns, after, of_after, n: int) -> list[Taken]:
    """As `taken_rows`, with gradients from `put_columns`."""
    start = lambda product: OF_COLUMNS * n + 8 * sum(map(len, COLUMNS[:product]))
    return [*(Taken(columns.at[i], EIGHTHS, 64 * n, of_columns, eighths, start(i))
              for i, eighths in enumerate(COLUMNS)),
            Taken(after, EIGHTHS, 64 * n, of_after, EIGHTHS, 64 * n)]


def pull_row(q: int, taken: list[Taken], present: bool, factors: Factors, totals: Totals,
             start: Array | None = None) -> tuple[Array, Array]:
    """(dx, sum of row ∘ drow), [8, 128], of an eighth of what `scale_rows` took; taken: its products, and the rows for
    the state; start: 1 where the row was not one of the past, or None."""
    own, ends = taken[1 - q % 2].at(q)
    past, more = taken[4].at(q)
    ends += more
    if q >= 4:
        past *= totals[12]
    elif q in (2, 3):
        past *= totals[8]
    if q in UPPER_32:
        here, more = taken[3].at(q)
        past, ends = past + here, ends + more
        if q in (6, 7):
            past *= totals[10]
    if q in UPPER_16:
        here, more = taken[2].at(q)
        past, ends = past + here, ends + more
    if q % 2:
        past *= totals[q - 1]
    own_row, before = ("own_row_present", "before_present") if present else ("own_row", "before")
    past = factors.at(before, q) * past
    return factors.at(own_row, q) * own + (past if start is None else jnp.where(start > 0, 0, past)), ends


def pull_own(q: int, taken: list[Taken], name: str, factors: Factors) -> tuple[Array, Array]:
    """The same where only the product of its own eighth has it; name: of its factor."""
    own, ends = taken[1 - q % 2].at(q)
    return factors.at(name, q) * own, ends


def pull_column(q: int, taken: list[Taken], factors: Factors, totals: Totals) -> tuple[Array, Array, Array]:
    """(dx, sum of column ∘ dcolumn, what of it the state made), for what `scale_columns` took."""
    own, ends = taken[1 - q % 2].at(q)
    after, of_state = taken[4].at(q)
    ends += of_state
    if q < 4:
        after *= totals[13]
    elif q in (4, 5):
        after *= totals[11]
    if q in COLUMNS[3]:
        here, more = taken[3].at(q)
        after, ends = after + here, ends + more
        if q in (0, 1):
            after *= totals[9]
    if q in COLUMNS[2]:
        here, more = taken[2].at(q)
        after, ends = after + here, ends + more
    if q % 2 == 0:
        here, more = taken[0].at(q)
        after, ends = after * totals[q + 1] + here * totals[14 + q // 2], ends + more
    return factors.at("own_column", q) * own + factors.at("after", q) * after, ends, of_state


def decay_gradient(w: Array, start: Array | None, until: Array, strict: Array, whole: Array) -> Array:
    """[64, 128] of log-decays w. until: what counts for the decays until its own position, that of `strict` not for its
    own; whole [8, 128]: what counts for all, of which the sum over the rows is taken."""
    for shift in (4, 2, 1):
        whole = whole + pltpu.roll(whole, shift, 0)
    sums, out = registers(sums_to_end(until)), [whole] * len(EIGHTHS)
    for q in reversed(EIGHTHS):
        out[q] = sums[q] + whole
        whole = whole + jnp.broadcast_to(sums[q][:1], REGISTER)
    out = jnp.where(w * LOG2_E > FORGETS, jnp.concatenate(out) - strict, 0)
    return out if start is None else jnp.where(start > 0, 0, out)
