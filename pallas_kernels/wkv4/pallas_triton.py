"""Triton kernels, for GPUs of compute capability 8.x and, by name, later ones. B batch, T time, C channels.

A thread keeps the state of its channels in registers and goes through time; the rows of a block of steps come while the
block before is worked on. The state before every block is saved; the backward computes a block forward again, keeps its
states in registers, and sweeps it from the end. Steps that fill no block are blocks of one.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import gpu, triton_rows
from pallas_kernels.batching import merged_into_batch
from pallas_kernels.triton_rows import Channels, restarts, through_time
from pallas_kernels.wkv4.gpu_steps import absorb, close_state, forgotten, open_state, output, sweep

Array = jax.Array
# Bytes of a channel of k in a block: 16 steps of bfloat16, 8 of float32. Saved states then are an eighth of k and v.
BLOCK = 32
unsupported = gpu.no_triton


@merged_into_batch
def forward(w: Array, u: Array, k: Array, v: Array, state: Array, reset: Array | None) -> tuple[Array, Array]:
    """y [B, T, C] in v's dtype and the final state [B, 2, C] in float32."""
    return _forward(w, u, k, v, state, reset, saving=False)


@merged_into_batch
def forward_saving(w: Array, u: Array, k: Array, v: Array, state: Array,
                   reset: Array | None) -> tuple[Array, Array, Array]:
    """y, the final state, and the states [B, blocks, 2, C] before each block of steps."""
    return _forward(w, u, k, v, state, reset, saving=True)


@merged_into_batch
def backward(w: Array, u: Array, k: Array, v: Array, reset: Array | None, starts: Array, last: Array, dy: Array,
             dlast: Array) -> tuple[Array, Array, Array, Array, Array]:
    """(dw, du, dk, dv, dstate) from the saved states and the cotangents of y and of the final state."""
    grid, specs = triton_rows.grid_and_specs(k.shape)
    words = [] if reset is None else [gpu.reset_words(reset)]
    block, row, rows = specs["block"], specs["row"], specs["rows"]
    mean, dmean, dlog = last[:, 0], dlast[:, 0], dlast[:, 1]
    adjoint = jnp.stack([dmean, dlog - dmean * mean], axis=1)
    flat = _flat(starts)
    dw, du, dk, dv, adjoint = _call(
        functools.partial(_backward_kernel, k.shape, k.dtype.itemsize), "wkv4_backward", grid,
        in_specs=[row, row, block, block, block, rows(flat.shape[1]), rows(2),
                  *(specs["words"](x.shape[1]) for x in words)],
        out_specs=[row, row, block, block, rows(2)],
        out_shape=[gpu.like(w), gpu.like(u), gpu.like(k), gpu.like(v), gpu.like(adjoint)],
    )(w, u, k, v, dy, flat, adjoint, *words)
    da, db = adjoint[:, 0], adjoint[:, 1]
    return dw, du, dk, dv, jnp.stack([da, da * starts[:, 0, 0] + db], axis=1)


def _forward(w, u, k, v, state, reset, saving: bool) -> tuple[Array, ...]:
    grid, specs = triton_rows.grid_and_specs(k.shape)
    words = [] if reset is None else [gpu.reset_words(reset)]
    block, row, rows = specs["block"], specs["row"], specs["rows"]
    out_specs, out_shape = [block, rows(2)], [gpu.like(v), gpu.like(state)]
    batch, length, width = k.shape
    blocks = sum(divmod(length, _steps(k.dtype.itemsize)))
    if saving:
        out_specs.append(rows(2 * blocks))
        out_shape.append(gpu.like(state, batch, 2 * blocks, width))
    y, last, *starts = _call(
        functools.partial(_forward_kernel, k.shape, k.dtype.itemsize, len(words)), "wkv4_forward", grid,
        in_specs=[row, row, block, block, rows(2), *(specs["words"](x.shape[1]) for x in words)],
        out_specs=out_specs, out_shape=out_shape,
    )(w, u, k, v, state, *words)
    return y, last, *(x.reshape(batch, blocks, 2, width) for x in starts)


def _forward_kernel(shape: tuple[int, int, int], itemsize: int, num_words: int, w_ref, u_ref, k_ref, v_ref, state_ref,
                    *refs):
    words, (y_ref, last_ref, *starts_ref) = refs[:num_words], refs[num_words:]
    channels, steps = Channels(shape[2]), _steps(itemsize)
    w, u = channels.read(w_ref), channels.read(u_ref)

    def save(ref, index, state):
        for i, x in enumerate(close_state(state)):
            channels.write(ref, x, 2 * index + i)

    def block(start, count, rows, state):
        for ref in starts_ref:
            save(ref, _index(start, count, shape[1], steps), state)
        for j, (k, v) in enumerate(rows):
            k, v = k.astype(w.dtype), v.astype(w.dtype)
            state = forgotten(state, restarts(words, start, j))
            channels.write(y_ref, output(u, k, v, state), start + j)
            state = absorb(w, k, v, state)
        return state

    read = _reader(channels, k_ref, v_ref)
    state = open_state(channels.read(state_ref, 0), channels.read(state_ref, 1))
    save(last_ref, 0, through_time(shape[1], steps, False, read, block, state))


def _backward_kernel(shape: tuple[int, int, int], itemsize: int, w_ref, u_ref, k_ref, v_ref, dy_ref, starts_ref,
                     adjoint_ref, *refs):
    words, (dw_ref, du_ref, dk_ref, dv_ref, out_ref) = refs[:-5], refs[-5:]
    channels, steps = Channels(shape[2]), _steps(itemsize)
    w, u = channels.read(w_ref), channels.read(u_ref)

    def block(start, count, rows, adjoint):
        first = 2 * _index(start, count, shape[1], steps)
        state = open_state(channels.read(starts_ref, first), channels.read(starts_ref, first + 1))
        forgets = [restarts(words, start, j) for j in range(count)]
        rows = [tuple(x.astype(w.dtype) for x in row) for row in rows]
        kept = []
        for (k, v, _), forget in zip(rows, forgets, strict=True):
            kept.append(forgotten(state, forget))
            state = absorb(w, k, v, kept[-1])
        da, db, dw, du = adjoint
        adjoint = da / state[1], db / state[1], dw, du        # from the scale of the next block, where b = 1
        for j in reversed(range(count)):
            dk, dv, (da, db, dw, du) = sweep(w, u, *rows[j], kept[j], adjoint)
            channels.write(dk_ref, dk, start + j)
            channels.write(dv_ref, dv, start + j)
            adjoint = forgets[j](da, 0.0), forgets[j](db, 0.0), dw, du
        return adjoint

    zero = jnp.zeros_like(w)
    adjoint = channels.read(adjoint_ref, 0), channels.read(adjoint_ref, 1), zero, zero
    read = _reader(channels, k_ref, v_ref, dy_ref)
    da, db, dw, du = through_time(shape[1], steps, True, read, block, adjoint)
    channels.write(dw_ref, dw)
    channels.write(du_ref, du)
    channels.write(out_ref, da, 0)
    channels.write(out_ref, db, 1)


def _steps(itemsize: int) -> int:
    return BLOCK // itemsize


def _index(start, count: int, length: int, steps: int):
    """Which block begins at `start`: after those of `steps` steps come the single ones."""
    whole = length // steps
    if count == 1:
        return whole + (start - whole * steps)
    return jax.lax.div(jnp.asarray(start, jnp.int32), jnp.int32(steps))


def _reader(channels: Channels, *refs) -> Callable:
    return lambda start, count: tuple(tuple(channels.read(x, start + j) for x in refs) for j in range(count))


def _flat(starts: Array) -> Array:
    return starts.reshape(starts.shape[0], -1, starts.shape[-1])


def _call(kernel: Callable, name: str, grid, **specs):
    from jax.experimental.pallas import triton as plt
    return pl.pallas_call(kernel, grid=grid, name=name, interpret=gpu.interpret_triton(),
                          compiler_params=plt.CompilerParams(num_warps=triton_rows.WARPS, num_stages=1), **specs)
