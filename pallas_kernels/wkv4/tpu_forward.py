"""The forward kernel: what one block of the grid does, and what the backward shares with it.

Exponents are in powers of 2 inside: the hardware has 2^x, and e^x costs a multiplication more each.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.wkv4.config import BITS, LANES, SUBLANES, TIME, Tiles
from pallas_kernels.wkv4.reference import EMPTY
from pallas_kernels.wkv4.registers import (
    joined,
    load_rows,
    steps_in,
    steps_turned,
    store_rows,
    turn_in,
    turn_out,
)

Array = jax.Array
LOG2E, LN2 = 1 / math.log(2), math.log(2)
# 2^80 times the weight of all past is as good as infinitely more, and does not overflow times a value up to 2^47.
LARGEST = 80.0
TOGETHER = 2        # chains in one loop body: one waits for its exponentials while the other computes


def kernel(tile: Tiles, length: int, has_reset: bool, saving: bool, *refs):
    """refs: [reset], w, u, state, k, v; y, last, [starts]; then scratch: rates, past, k and v turned, [resets]."""
    reset_ref, refs = (refs[0], refs[1:]) if has_reset else (None, refs)
    w_ref, u_ref, state_ref, k_ref, v_ref, y_ref, last_ref, *refs = refs
    start_ref, refs = (refs[0], refs[1:]) if saving else (None, refs)
    rates, past, k_turned, v_turned, *resets = refs
    num = steps_turned(k_ref.dtype)
    fill_resets(tile, reset_ref, resets)

    @pl.when(pl.program_id(2) == 0)
    def _():
        fill_rates(tile, w_ref, u_ref, rates)
        open_state(tile, state_ref, past)

    if saving:
        close_state(tile, past, start_ref)

    def trip(start, chains, count):
        for i, chain in enumerate(chains):
            turn_in(k_ref, tile, start, chain, k_turned.at[i])
            turn_in(v_ref, tile, start, chain, v_turned.at[i])

        def register(j, n, moments, carry):
            a, b, p = carry
            w, u, out = rates[0, chains[n]], rates[1, chains[n]], []
            for k, v, (forget, here) in zip(steps_in(k_turned[n, j]), steps_in(v_turned[n, j]), moments, strict=True):
                before, k = (a, b, p), k * LOG2E
                a, p = forget(a, 0), forget(p, EMPTY * LOG2E)
                now = newest(u, k, p)
                out.append((a + now * v) * reciprocal(b + now, y_ref.dtype))
                older, newer, p = decayed(w, k, p)
                a, b, p = here((older * a + newer * v, older * b + newer, p), before)
            k_turned[n, j] = joined(out)
            return a, b, p

        carry = tuple((past[0, chain], past[1, chain], past[2, chain]) for chain in chains)
        carry = for_registers(resets, start, num, count, register, carry)
        for i, (chain, (a, b, p)) in enumerate(zip(chains, carry, strict=True)):
            turn_out(k_turned.at[i], tile, start, chain, y_ref)
            past[0, chain], past[1, chain], past[2, chain] = a, b, p

    for_groups(tile, length, pl.program_id(2), num, trip)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        close_state(tile, past, last_ref)


def newest(u: Array, k: Array, p: Array) -> Array:
    """Weight of the newest step, as a multiple of 2^p."""
    return jnp.exp2(jnp.minimum(k + u - p, LARGEST))


def decayed(w: Array, k: Array, p: Array) -> tuple[Array, Array, Array]:
    """(weight of the past, weight of the step, the next scale), the larger weight 1."""
    p = p - w
    top = jnp.maximum(p, k)
    return jnp.exp2(p - top), jnp.exp2(k - top), top


# jax 0.12 has it in pltpu and warns of the place where jax 0.10 has it.
_reciprocal = pltpu.reciprocal if hasattr(pltpu, "reciprocal") else pl.reciprocal


def reciprocal(x: Array, dtype) -> Array:
    """1 / x for x in [1, 2^100]: the hardware's estimate and Newton steps, without the checks of a general division."""
    y = _reciprocal(x, approx=True)
    for _ in range(1 if dtype == jnp.bfloat16 else 2):
        y = y * (2 - x * y)
    return y


def for_groups(tile: Tiles, length: int, block, num: int, trip, backwards: bool = False) -> None:
    """trip(start, chains, count) for all groups of `num` steps of a block and all chains, `TOGETHER` at a time.

    Only the last group of the last block may have fewer steps, count; what lies in memory after them is anything.
    """
    together = TOGETHER if tile.chains % TOGETHER == 0 else 1
    turns, groups = tile.chains // together, TIME // num
    whole, tail = divmod(length % TIME, num) if length % TIME else (groups, 0)
    last = (length - 1) // TIME
    bound = groups if whole == groups else jnp.where(block == last, whole, groups)

    def body(n, _):
        group, turn = (n, 0) if turns == 1 else (n // turns, n % turns)
        group = bound - 1 - group if backwards else group
        trip(pl.multiple_of(group * num, num), [turn * together + i for i in range(together)], num)
        return 0

    def rest():
        @pl.when(block == last)
        def _():
            for turn in range(turns):
                trip(whole * num, [turn * together + i for i in range(together)], tail)

    if tail and backwards:
        rest()
    if whole or last:
        jax.lax.fori_loop(0, bound * turns, body, 0)
    if tail and not backwards:
        rest()


def fill_rates(tile: Tiles, w_ref, u_ref, rates) -> None:
    """w and u in powers of 2."""
    for chain in range(tile.chains):
        rates[0, chain] = load_rows(w_ref, tile, 0, chain) * LOG2E
        rates[1, chain] = load_rows(u_ref, tile, 0, chain) * LOG2E


def open_state(tile: Tiles, state_ref, past) -> None:
    """From average and log weight to a, b = 1 and p."""
    for chain in range(tile.chains):
        past[0, chain] = load_rows(state_ref, tile, 0, chain)
        past[1, chain] = jnp.ones((SUBLANES, LANES), jnp.float32)
        past[2, chain] = load_rows(state_ref, tile, 1, chain) * LOG2E


def close_state(tile: Tiles, past, state_ref) -> None:
    """The opposite of `open_state`."""
    for chain in range(tile.chains):
        store_rows(state_ref, tile, 0, chain, past[0, chain] * reciprocal(past[1, chain], jnp.float32))
        store_rows(state_ref, tile, 1, chain, past[2, chain] * LN2 + jnp.log(past[1, chain]))


def fill_resets(tile: Tiles, reset_ref, resets) -> None:
    """resets[0], [words of the block, rows, 128]: bit i of word j in all lanes, whether the row forgets at 32 j + i."""
    if not resets:
        return
    words = jnp.concatenate([reset_ref[row] for row in range(tile.rows) for _ in range(tile.groups)])
    for j in range(TIME // BITS):
        resets[0][j] = jnp.broadcast_to(words[:, j:j + 1], (SUBLANES, LANES))


def for_registers(resets, start, num: int, count: int, register, carries: tuple, backwards: bool = False) -> tuple:
    """The carries of all chains after register(j, chain, moments, carry) for the registers with `count` steps.

    moments: (forget, here) of each step of the register. forget(x, empty) is x with `empty` in the rows that reset at
    that step. here(new, old) is `new`, where the step is one of the `count` that the group has.
    """
    each = num // SUBLANES
    bits = resets[0][start // BITS] >> jax.lax.rem(start, BITS) if resets else None

    def moment(step):
        here = lambda new, old: new
        if count % each:
            here = lambda new, old: tuple(jnp.where(step < count, x, y) for x, y in zip(new, old, strict=True))
        if not resets:
            return lambda x, empty: x, here
        restarts = (bits & (1 << step)) != 0
        return lambda x, empty: jnp.where(restarts, empty, x), here

    def body(j, carries):
        j = pl.cdiv(count, each) - 1 - j if backwards else j
        moments = [moment(j * each + i) for i in range(each)]
        return tuple(register(j, n, moments, carry) for n, carry in enumerate(carries))

    return jax.lax.fori_loop(0, pl.cdiv(count, each), body, carries, unroll=True)
