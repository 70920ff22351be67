"""Triton kernel, for GPUs of compute capability 8.x and, by name, later ones. B batch, T time, C channels.

A step is one multiply-add a channel, so a thread keeps the state of its channels in registers and goes through time.
Neighbouring channels are neighbours in memory: each step of each array is one load of a warp, and the loads
of a block of steps are under way while the block before is worked on.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import gpu, triton_rows
from pallas_kernels.batching import merged_into_batch
from pallas_kernels.linear_scan.gates import Gates
from pallas_kernels.triton_rows import Channels, restarts, through_time

Array = jax.Array
BLOCK = 32       # bytes of a channel that a program asks for at once of each array: 16 steps of bfloat16, 8 of float32
unsupported = gpu.no_triton


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
        grid, specs = triton_rows.grid_and_specs(inputs[0].shape)
        words = [] if reset is None else [gpu.reset_words(reset)]
        kernel = functools.partial(_forward_kernel, gates, inputs[0].shape, len(words), len(inputs))
        return _call(
            kernel, f"{name}_forward", grid,
            in_specs=[*(specs["words"](x.shape[1]) for x in words), *[specs["block"]] * len(inputs), specs["row"]],
            out_specs=[specs["block"], specs["row"]], out_shape=[gpu.like(inputs[-1]), gpu.like(h0)],
        )(*words, *inputs, h0)

    return tuple(run(h0, reset, *inputs))


def _backward(name: str, decay: Callable, pull: Callable, inputs: tuple[Array, ...], num_gradients: int, h: Array,
              h0: Array, reset: Array | None, dh: Array, dh_last: Array):
    """a = decay(*inputs); the gradients to write are pull(inputs, da, db)."""
    @merged_into_batch
    def run(h0, reset, h, dh, dh_last, *inputs):
        grid, specs = triton_rows.grid_and_specs(h.shape)
        words = [] if reset is None else [gpu.reset_words(reset)]
        block, row = specs["block"], specs["row"]
        kernel = functools.partial(_backward_kernel, decay, pull, h.shape, len(words), len(inputs))
        return _call(
            kernel, f"{name}_backward", grid,
            in_specs=[*(specs["words"](x.shape[1]) for x in words), *[block] * len(inputs), block, row, block, row],
            out_specs=[*[block] * num_gradients, row],
            out_shape=[*[gpu.like(dh)] * num_gradients, gpu.like(h0)],
        )(*words, *inputs, h, h0, dh, dh_last)

    *gradients, dh0 = run(h0, reset, h, dh, dh_last, *inputs)
    return tuple(gradients), dh0


def _call(kernel: Callable, name: str, grid, **specs):
    from jax.experimental.pallas import triton as plt
    return pl.pallas_call(kernel, grid=grid, name=name, interpret=gpu.interpret_triton(),
                          compiler_params=plt.CompilerParams(num_warps=triton_rows.WARPS, num_stages=1), **specs)


def _forward_kernel(gates: Callable, shape: tuple[int, int, int], num_words: int, num_inputs: int, *refs):
    words, inputs, (h0_ref, h_ref, last_ref) = _split(refs, num_words, num_inputs)
    channels = Channels(shape[2])

    def block(start, count, rows, h):
        for j, row in enumerate(rows):
            a, b = gates(*(x.astype(h.dtype) for x in row))
            h = a * restarts(words, start, j)(h, 0.0) + b
            channels.write(h_ref, h, start + j)
        return h

    read = lambda start, count: tuple(tuple(channels.read(x, start + j) for x in inputs) for j in range(count))
    h = through_time(shape[1], BLOCK // inputs[0].dtype.itemsize, False, read, block, channels.read(h0_ref))
    channels.write(last_ref, h)


def _backward_kernel(decay: Callable, pull: Callable, shape: tuple[int, int, int], num_words: int, num_inputs: int,
                     *refs):
    """mu is what a step hands to the one before: README.md derives it."""
    words, inputs, (h_ref, h0_ref, dh_ref, dh_last_ref, *gradient_refs, dh0_ref) = _split(refs, num_words, num_inputs)
    channels = Channels(shape[2])
    h0 = channels.read(h0_ref)

    def block(start, count, rows, mu):
        for j in reversed(range(count)):
            *row, before, dh = (x.astype(mu.dtype) for x in rows[j])
            if j == 0:
                before = jnp.where(start == 0, h0, before)
            forget = restarts(words, start, j)
            db = dh + mu
            gradients = pull(tuple(row), db * forget(before, 0.0), db)
            mu = forget(decay(*row) * db, 0.0)
            for ref, gradient in zip(gradient_refs, gradients, strict=True):
                channels.write(ref, gradient, start + j)
        return mu

    def read(start, count):
        """Inputs, the state before (of the first step h_0 itself, which is not the one before) and the cotangent."""
        at = lambda j: start + j
        return tuple((*(channels.read(x, at(j)) for x in inputs), channels.read(h_ref, jnp.maximum(at(j) - 1, 0)),
                      channels.read(dh_ref, at(j))) for j in range(count))

    mu = through_time(shape[1], BLOCK // inputs[0].dtype.itemsize, True, read, block, channels.read(dh_last_ref))
    channels.write(dh0_ref, mu)


def _split(refs, num_words: int, num_inputs: int):
    return refs[:num_words], refs[num_words:num_words + num_inputs], refs[num_words + num_inputs:]
