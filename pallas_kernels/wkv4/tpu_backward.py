"""The backward kernel: what one block of the grid does. Blocks come from the end of the row."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.wkv4.config import Tiles
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
from pallas_kernels.wkv4.tpu_forward import (
    LOG2E,
    decayed,
    fill_rates,
    fill_resets,
    for_groups,
    for_registers,
    newest,
    open_state,
    reciprocal,
)


def kernel(tile: Tiles, length: int, has_reset: bool, *refs):
    """refs: [reset], w, u, start, adjoint, k, v, dy; dw, du, dk, dv, adjoint; then scratch.

    Scratch: rates, past, adjoint, sums of the gradients of w and u, the states a, b, p before every step of the block,
    k, v and dy turned, [resets]. The steps are computed forward again from the saved start, then swept from the end.
    """
    reset_ref, refs = (refs[0], refs[1:]) if has_reset else (None, refs)
    (w_ref, u_ref, start_ref, above_ref, k_ref, v_ref, dy_ref, dw_ref, du_ref, dk_ref, dv_ref, below_ref,
     rates, past, adjoint, sums, states, k_turned, v_turned, dy_turned, *resets) = refs
    block = pl.num_programs(2) - 1 - pl.program_id(2)
    num = steps_turned(k_ref.dtype)
    each = num // 8                     # steps in a register
    fill_resets(tile, reset_ref, resets)
    open_state(tile, start_ref, past)

    @pl.when(pl.program_id(2) == 0)
    def _():
        fill_rates(tile, w_ref, u_ref, rates)
        for chain in range(tile.chains):
            adjoint[0, chain] = load_rows(above_ref, tile, 0, chain)
            adjoint[1, chain] = load_rows(above_ref, tile, 1, chain)
        sums[...] = jnp.zeros_like(sums)

    def again(start, chains, count):
        group = start // num
        for chain in chains:
            turn_in(k_ref, tile, start, chain, k_turned.at[group, chain])
            turn_in(v_ref, tile, start, chain, v_turned.at[group, chain])

        def register(j, n, moments, carry):
            (a, b, p), chain = carry, chains[n]
            pairs = (steps_in(x[group, chain, j]) for x in (k_turned, v_turned))
            for i, (k, v, (forget, here)) in enumerate(zip(*pairs, moments, strict=True)):
                before, a, p = (a, b, p), forget(a, 0), forget(p, EMPTY * LOG2E)
                states[start + j * each + i, chain] = jnp.stack([a, b, p])
                older, newer, p = decayed(rates[0, chain], k * LOG2E, p)
                a, b, p = here((older * a + newer * v, older * b + newer, p), before)
            return a, b, p

        carry = tuple((past[0, chain], past[1, chain], past[2, chain]) for chain in chains)
        carry = for_registers(resets, start, num, count, register, carry)
        for chain, (a, b, p) in zip(chains, carry, strict=True):
            past[0, chain], past[1, chain], past[2, chain] = a, b, p

    def sweep(start, chains, count):
        group = start // num
        for n, chain in enumerate(chains):
            turn_in(dy_ref, tile, start, chain, dy_turned.at[n])

        def register(j, n, moments, carry):
            da, db, dw, du = carry
            chain = chains[n]
            w, u, dks, dvs = rates[0, chain], rates[1, chain], [], []
            pairs = (steps_in(x) for x in (k_turned[group, chain, j], v_turned[group, chain, j], dy_turned[n, j]))
            for i, (k, v, dy, (forget, here)) in reversed(list(enumerate(zip(*pairs, moments, strict=True)))):
                before, k = (da, db, dw, du), k * LOG2E
                a, b, p = states[start + j * each + i, chain]
                now = newest(u, k, p)
                share = reciprocal(b + now, k_ref.dtype)
                slope, y = dy * share, (a + now * v) * share
                older, newer, _ = decayed(w, k, p)
                direct = now * slope
                bonus = direct * (v - y)
                dks.insert(0, bonus + newer * (da * v + db))
                dvs.insert(0, direct + newer * da)
                dw, du = dw - older * (da * a + db * b), du + bonus
                da, db = forget(older * da + slope, 0), forget(older * db - slope * y, 0)
                da, db, dw, du = here((da, db, dw, du), before)
            k_turned[group, chain, j], v_turned[group, chain, j] = joined(dks), joined(dvs)
            return da, db, dw, du

        carry = tuple((adjoint[0, chain], adjoint[1, chain], sums[0, chain], sums[1, chain]) for chain in chains)
        carry = for_registers(resets, start, num, count, register, carry, backwards=True)
        for chain, (da, db, dw, du) in zip(chains, carry, strict=True):
            turn_out(k_turned.at[group, chain], tile, start, chain, dk_ref)
            turn_out(v_turned.at[group, chain], tile, start, chain, dv_ref)
            adjoint[0, chain], adjoint[1, chain], sums[0, chain], sums[1, chain] = da, db, dw, du

    for_groups(tile, length, block, num, again)
    for chain in range(tile.chains):        # the state after the block had the scale that makes b 1
        adjoint[0, chain] = adjoint[0, chain] / past[1, chain]
        adjoint[1, chain] = adjoint[1, chain] / past[1, chain]
    for_groups(tile, length, block, num, sweep, backwards=True)

    @pl.when(block == 0)
    def _():
        for chain in range(tile.chains):
            store_rows(dw_ref, tile, 0, chain, sums[0, chain])
            store_rows(du_ref, tile, 0, chain, sums[1, chain])
            store_rows(below_ref, tile, 0, chain, adjoint[0, chain])
            store_rows(below_ref, tile, 1, chain, adjoint[1, chain])
