"""TPU kernel. B batch, T time, C channels; in memory [B, T, C] as it comes: time on sublanes, channels on lanes.

A vector register holds 8 steps of 128 channels. Its 8 steps are scanned inside the register, log2(8) = 3 rounds of
shifted multiply-adds, and the state enters by one more. Batch on sublanes would need no rounds, but the transposes
before and after it move more bytes than the scan itself, and a batch of 1 would fill one sublane in 8; here the bytes
moved are those of a, b and h alone. README.md has the derivation and the cycles.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.batching import merged_into_batch
from pallas_kernels.linear_scan import blocks
from pallas_kernels.linear_scan.blocks import ROWS
from pallas_kernels.linear_scan.config import TPU, TPU_GATED, Tiles
from pallas_kernels.linear_scan.gates import Gates

Array = jax.Array
GROUP = 8      # sublanes of a register


def unsupported(dtype: str, platform: str) -> str | None:
    """Why this kernel cannot serve, or None."""
    if platform != "tpu":
        return f"it needs a TPU and this is {platform}"
    if dtype not in ("float32", "bfloat16"):
        return f"it takes float32 and bfloat16, not {dtype}"
    return dispatch.automatic_axes()


def forward(a: Array, b: Array, h0: Array, reset: Array | None) -> tuple[Array, Array]:
    """h [B, T, C] in b's dtype and the final state [B, C] in float32."""
    return _forward("linear_scan", lambda a, b: (a, b), (a, b), h0, reset)


def backward(a: Array, h: Array, h0: Array, reset: Array | None, dh: Array,
             dh_last: Array) -> tuple[Array, Array, Array]:
    """(da, db, dh0) from the saved h and the cotangents of h and of the final state."""
    (da, db), dh0 = _backward("linear_scan", lambda a: a, lambda inputs, da, db: (da, db), (a,), 2, h, h0, reset, dh,
                              dh_last)
    return da, db, dh0


def gated_forward(gates: Gates, inputs: tuple[Array, ...], h0: Array, reset: Array | None) -> tuple[Array, Array]:
    """The same with (a, b) = gates(*inputs), computed in registers."""
    return _forward(gates.unit, gates, inputs, h0, reset)


def gated_backward(gates: Gates, inputs: tuple[Array, ...], h: Array, h0: Array, reset: Array | None, dh: Array,
                   dh_last: Array) -> tuple[tuple[Array, ...], Array]:
    """(gradients of the inputs, dh0); a and b are computed again."""
    return _backward(gates.unit, gates.decay, gates.pull, inputs, len(inputs), h, h0, reset, dh, dh_last)


def _forward(name: str, gates: Callable, inputs: tuple[Array, ...], h0: Array, reset: Array | None):
    @merged_into_batch
    def run(h0, reset, *inputs):
        grid, specs = blocks.grid_and_specs(inputs[0].shape, _tiles(name), backwards=False)
        resets, reset_specs, scratch = blocks.reset_arguments(reset, specs)
        h, h_last = pl.pallas_call(
            functools.partial(_forward_kernel, gates, len(inputs), inputs[0].shape[1], reset is not None),
            grid=grid,
            in_specs=[*reset_specs, *[specs["block"]] * len(inputs), specs["state"]],
            out_specs=[specs["block"], specs["state"]],
            out_shape=[blocks.like(inputs[-1]), blocks.like(h0[:, None])],
            scratch_shapes=[pltpu.VMEM((GROUP, specs["tiles"].width), jnp.float32), *scratch],
            compiler_params=blocks.IN_ORDER, cost_estimate=blocks.cost(inputs[0], len(inputs) + 1),
            name=f"{name}_forward",
        )(*resets, *inputs, h0[:, None])
        return h, h_last[:, 0]

    return run(h0, reset, *inputs)


def _backward(name: str, decay: Callable, pull: Callable, inputs: tuple[Array, ...], num_gradients: int, h: Array,
              h0: Array, reset: Array | None, dh: Array, dh_last: Array):
    """a = decay(*inputs); the gradients to write are pull(inputs, da, db)."""
    @merged_into_batch
    def run(h0, reset, h, dh, dh_last, *inputs):
        arrays = len(inputs) + 2 + num_gradients
        grid, specs = blocks.grid_and_specs(h.shape, _tiles(name), backwards=True)
        resets, reset_specs, scratch = blocks.reset_arguments(reset, specs)
        block = specs["block"]
        *gradients, dh0 = pl.pallas_call(
            functools.partial(_backward_kernel, decay, pull, len(inputs), h.shape[1], reset is not None),
            grid=grid,
            in_specs=[*reset_specs, *[block] * len(inputs), block, specs["before"], specs["state"], block,
                      specs["state"]],
            out_specs=[*[block] * num_gradients, specs["state"]],
            out_shape=[*[blocks.like(dh)] * num_gradients, blocks.like(h0[:, None])],
            scratch_shapes=[pltpu.VMEM((GROUP, specs["tiles"].width), jnp.float32), *scratch],
            compiler_params=blocks.IN_ORDER, cost_estimate=blocks.cost(h, arrays), name=f"{name}_backward",
        )(*resets, *inputs, h, h, h0[:, None], dh, dh_last[:, None])
        return tuple(gradients), dh0[:, 0]

    return run(h0, reset, h, dh, dh_last, *inputs)


def _forward_kernel(gates: Callable, num_inputs: int, length: int, has_reset: bool, *refs):
    reset_ref, refs = (refs[0], refs[1:]) if has_reset else (None, refs)
    input_refs, (h0_ref, h_ref, h_last_ref, state, *keep) = refs[:num_inputs], refs[num_inputs:]
    chunk, rows = pl.program_id(2), h_ref.shape[1]
    _turn_resets(reset_ref, keep)

    @pl.when(chunk == 0)
    def _():
        state[...] = jnp.broadcast_to(h0_ref[0], state.shape)

    def trip(i, carry):
        start = pl.multiple_of(i * ROWS, ROWS)
        a, b = gates(*(_read(ref, start) for ref in input_refs))
        a, b = _within(length, rows, chunk, start, _forget(a, keep, start), b)
        out = []
        for group in range(0, ROWS, GROUP):
            decay, h = _scan_register(a[group:group + GROUP], b[group:group + GROUP])
            h = h + decay * carry
            carry = jnp.broadcast_to(h[GROUP - 1:], h.shape)
            out.append(h)
        h_ref[0, pl.ds(start, ROWS), :] = jnp.concatenate(out).astype(h_ref.dtype)
        return carry

    state[...] = jax.lax.fori_loop(0, rows // ROWS, trip, state[...])
    h_last_ref[0] = state[:1]


def _backward_kernel(decay: Callable, pull: Callable, num_inputs: int, length: int, has_reset: bool, *refs):
    reset_ref, refs = (refs[0], refs[1:]) if has_reset else (None, refs)
    input_refs, (h_ref, before_ref, h0_ref, dh_ref, dh_last_ref, *refs) = refs[:num_inputs], refs[num_inputs:]
    after = 2 if has_reset else 1
    (*gradient_refs, dh0_ref), (state, *keep) = refs[:-after], refs[-after:]
    rows = h_ref.shape[1]
    chunk = pl.num_programs(2) - 1 - pl.program_id(2)
    _turn_resets(reset_ref, keep)

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = jnp.broadcast_to(dh_last_ref[0], state.shape)

    row = jax.lax.broadcasted_iota(jnp.int32, state.shape, 0)

    def trip(start, mu, h, h_before):
        """One trip; mu is a_t dh_t of the step after it, h_before the ROWS states before it."""
        inputs = [_read(ref, start) for ref in input_refs]
        a, dh = _within(length, rows, chunk, start, _forget(decay(*inputs), keep, start), _read(dh_ref, start))
        kept = _keep(keep, start, a.shape)
        gradients = []
        for group in reversed(range(0, ROWS, GROUP)):
            here = slice(group, group + GROUP)
            map_to, local = _scan_register(a[here], a[here] * dh[here], reverse=True)
            mus = local + map_to * mu
            grad = dh[here] + jnp.where(row == GROUP - 1, mu, pltpu.roll(mus, GROUP - 1, 0))
            last = h[group - 1:group] if group else h_before[ROWS - 1:]
            previous = jnp.where(row == 0, jnp.broadcast_to(last, grad.shape), pltpu.roll(h[here], 1, 0))
            slope = grad * previous
            slope = slope if kept is None else jnp.where(kept[here] > 0, slope, 0)
            gradients.append(pull([x[here] for x in inputs], slope, grad))
            mu = jnp.broadcast_to(mus[:1], mus.shape)
        for ref, *groups in zip(gradient_refs, *reversed(gradients), strict=True):
            ref[0, pl.ds(start, ROWS), :] = jnp.concatenate(groups).astype(ref.dtype)
        return mu, h_before

    trips = rows // ROWS

    def from_the_end(i, carry):
        start = pl.multiple_of((trips - 1 - i) * ROWS, ROWS)
        return trip(start, *carry, _read(h_ref, start - ROWS))

    carry = jax.lax.fori_loop(0, trips - 1, from_the_end, (state[...], _read(h_ref, rows - ROWS)))
    h_before = jnp.where(chunk == 0, h0_ref[0], before_ref[0].astype(jnp.float32))
    mu, _ = trip(0, *carry, h_before)
    state[...] = mu
    dh0_ref[0] = mu[:1]


def _scan_register(a: Array, b: Array, reverse: bool = False) -> tuple[Array, Array]:
    """(decay, h) of each of the 8 steps from the state before the first (after the last): h_t = h + decay * state."""
    row = jax.lax.broadcasted_iota(jnp.int32, a.shape, 0)
    for distance in (1, 2, 4):
        inside = row < GROUP - distance if reverse else row >= distance
        shift = GROUP - distance if reverse else distance
        b = jnp.where(inside, b + a * pltpu.roll(b, shift, 0), b)
        a = jnp.where(inside, a * pltpu.roll(a, shift, 0), a)
    return a, b


def _read(ref, start) -> Array:
    return ref[0, pl.ds(start, ROWS), :].astype(jnp.float32)


def _within(length: int, rows: int, chunk, start, a: Array, b: Array) -> tuple[Array, Array]:
    """Steps at or after `length` made the identity: what lies in memory after the end of the array is anything."""
    if length % rows == 0:
        return a, b
    inside = chunk * rows + start + jax.lax.broadcasted_iota(jnp.int32, a.shape, 0) < length
    return jnp.where(inside, a, 1), jnp.where(inside, b, 0)


def _turn_resets(reset_ref, keep) -> None:
    """Fill keep[0], [rows, 128], with 1 - reset of each step in all lanes; in memory the steps lie along lanes."""
    if not keep:
        return
    for start in range(0, keep[0].shape[0], 128):
        along = jnp.broadcast_to(1 - reset_ref[0, :, pl.ds(start, 128)], (128, 128))
        keep[0][pl.ds(start, 128), :] = along.T


def _keep(keep, start, shape: tuple[int, int]) -> Array | None:
    return jnp.tile(keep[0][pl.ds(start, ROWS), :], (1, shape[1] // 128)) if keep else None


def _forget(a: Array, keep, start) -> Array:
    kept = _keep(keep, start, a.shape)
    return a if kept is None else jnp.where(kept > 0, a, 0)


def _tiles(name: str) -> Tiles:
    return TPU if name == "linear_scan" else TPU_GATED
