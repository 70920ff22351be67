"""Mosaic GPU kernel, for Hopper and Blackwell (compute capability 9.x and 10.x). B batch, T time, C channels.

A thread has one channel of one row: its state stays in a register, and blocks of steps come and go through shared
memory (`pallas_kernels/mosaic_rows.py`). The compute of a step, a few instructions, hides behind the bytes.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import gpu, mosaic_rows
from pallas_kernels.batching import merged_into_batch
from pallas_kernels.linear_scan.gates import Gates
from pallas_kernels.mosaic_rows import GROUP, Place, padded, read_group

Array = jax.Array
unsupported = gpu.no_mosaic


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
        width = h0.shape[-1]
        h0, inputs = padded(h0), [padded(x) for x in inputs]
        words = [] if reset is None else [gpu.reset_words(reset)]
        h, last = mosaic_rows.call(f"{name}_forward", mosaic_rows.plan(inputs[0]),
                                   functools.partial(_forward_kernel, gates), inputs, [h0, *words],
                                   [gpu.like(inputs[-1])], [gpu.like(h0)])
        return h[..., :width], last[..., :width]

    return run(h0, reset, *inputs)


def _backward(name: str, decay: Callable, pull: Callable, inputs: tuple[Array, ...], num_gradients: int, h: Array,
              h0: Array, reset: Array | None, dh: Array, dh_last: Array):
    """a = decay(*inputs); the gradients to write are pull(inputs, da, db)."""
    @merged_into_batch
    def run(h0, reset, h, dh, dh_last, *inputs):
        width = h0.shape[-1]
        h0, h, dh, dh_last, *inputs = (padded(x) for x in (h0, h, dh, dh_last, *inputs))
        words = [] if reset is None else [gpu.reset_words(reset)]
        kernel = functools.partial(_backward_kernel, decay, pull)
        out = mosaic_rows.call(f"{name}_backward", mosaic_rows.plan(h), kernel, [*inputs, h, dh], [h0, dh_last, *words],
                               [gpu.like(dh)] * num_gradients, [gpu.like(h0)])
        return tuple(x[..., :width] for x in out)

    *gradients, dh0 = run(h0, reset, h, dh, dh_last, *inputs)
    return tuple(gradients), dh0


def _forward_kernel(gates: Callable, place: Place, others, given, made, rows):
    h0_ref, *words = others
    (last_ref,) = rows

    def block(start, inputs, outputs, h):
        def group(first, moments, h):
            read = read_group(inputs, first)
            for j, (forget, here) in enumerate(moments):
                a, b = gates(*read[j])
                h = here(a * forget(h, 0.0) + b, h)
                outputs[0][first + j] = h.astype(outputs[0].dtype)
            return h

        return place.in_groups(start, words, False, group, h)

    place.write(last_ref, place.through_time(given, made, False, block, place.read(h0_ref)))


def _backward_kernel(decay: Callable, pull: Callable, place: Place, others, given, made, rows):
    """mu is what a step hands to the one before: README.md derives it."""
    h0_ref, dh_last_ref, *words = others
    (dh0_ref,) = rows
    h_global = given[-2]
    h0 = place.read(h0_ref)

    def block(start, refs, outputs, mu):
        # Of the block before only its last state is wanted: it is asked for now and used last.
        before_block = jnp.where(start == 0, h0, place.read(h_global, jnp.maximum(start - 1, 0)))

        def group(first, moments, mu):
            read = read_group(refs, first)
            before_group = refs[-2][jnp.maximum(first - 1, 0)].astype(jnp.float32)
            before_group = jnp.where(first == 0, before_block, before_group)
            for j in reversed(range(GROUP)):
                forget, here = moments[j]
                *row, _, dh = read[j]
                before = read[j - 1][-2] if j else before_group
                db = dh + mu
                for ref, gradient in zip(outputs, pull(tuple(row), db * forget(before, 0.0), db), strict=True):
                    ref[first + j] = gradient.astype(ref.dtype)
                mu = here(forget(decay(*row) * db, 0.0), mu)
            return mu

        return place.in_groups(start, words, True, group, mu)

    place.write(dh0_ref, place.through_time(given, made, True, block, place.read(dh_last_ref)))
