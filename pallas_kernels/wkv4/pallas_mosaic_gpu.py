"""Mosaic GPU kernels, for Hopper and Blackwell (compute capability 9.x and 10.x). B batch, T time, C channels.

A thread has one channel of one row: its state stays in registers, and blocks of steps come and go through shared memory
(`pallas_kernels/mosaic_rows.py`). The state before every 16 steps is saved; the backward computes 16 steps forward
again, keeps their states in registers, and sweeps them from the end.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import gpu, mosaic_rows
from pallas_kernels.batching import merged_into_batch
from pallas_kernels.mosaic_rows import GROUP, Place, padded, read_group
from pallas_kernels.wkv4.gpu_steps import absorb, close_state, forgotten, open_state, output, sweep

Array = jax.Array
unsupported = gpu.no_mosaic


@merged_into_batch
def forward(w: Array, u: Array, k: Array, v: Array, state: Array, reset: Array | None) -> tuple[Array, Array]:
    """y [B, T, C] in v's dtype and the final state [B, 2, C] in float32."""
    return _forward(w, u, k, v, state, reset, saving=False)


@merged_into_batch
def forward_saving(w: Array, u: Array, k: Array, v: Array, state: Array,
                   reset: Array | None) -> tuple[Array, Array, Array]:
    """y, the final state, and the states [B, groups, 2, C] before each group of `GROUP` steps."""
    return _forward(w, u, k, v, state, reset, saving=True)


@merged_into_batch
def backward(w: Array, u: Array, k: Array, v: Array, reset: Array | None, starts: Array, last: Array, dy: Array,
             dlast: Array) -> tuple[Array, Array, Array, Array, Array]:
    """(dw, du, dk, dv, dstate) from the saved states and the cotangents of y and of the final state."""
    width = k.shape[-1]
    words = [] if reset is None else [gpu.reset_words(reset)]
    adjoint = jnp.stack([dlast[:, 0], dlast[:, 1] - dlast[:, 0] * last[:, 0]], axis=1)
    first_mean = starts[:, 0, 0]
    w, u, k, v, dy, starts, adjoint = (padded(x) for x in (w, u, k, v, dy, starts, adjoint))
    out = mosaic_rows.call("wkv4_backward", mosaic_rows.plan(k), _backward_kernel, [k, v, dy],
                           [w, u, starts, adjoint, *words], [gpu.like(k), gpu.like(v)],
                           [gpu.like(w), gpu.like(u), gpu.like(adjoint)])
    dk, dv, dw, du, adjoint = (x[..., :width] for x in out)
    da, db = adjoint[:, 0], adjoint[:, 1]
    return dw, du, dk, dv, jnp.stack([da, da * first_mean + db], axis=1)


def _forward(w, u, k, v, state, reset, saving: bool) -> tuple[Array, ...]:
    width = k.shape[-1]
    words = [] if reset is None else [gpu.reset_words(reset)]
    w, u, k, v, state = (padded(x) for x in (w, u, k, v, state))
    plan = mosaic_rows.plan(k)
    groups = plan.blocks * plan.steps // GROUP
    rows = [gpu.like(state), *[gpu.like(state, plan.batch, groups, 2, plan.width)] * saving]
    out = mosaic_rows.call("wkv4_forward", plan, _forward_kernel, [k, v], [w, u, state, *words], [gpu.like(v)], rows)
    return tuple(x[..., :width] for x in out)


def _forward_kernel(place: Place, others, given, made, rows):
    w_ref, u_ref, state_ref, *words = others
    last_ref, *starts_ref = rows
    w, u = place.read(w_ref), place.read(u_ref)

    def block(start, inputs, outputs, state):
        def group(first, moments, state):
            read = read_group(inputs, first)
            for ref in starts_ref:
                for i, x in enumerate(close_state(state)):
                    place.write(ref, x, _group(start + first), i)
            for j, (forget, here) in enumerate(moments):
                k, v = read[j]
                new = forgotten(state, forget)
                outputs[0][first + j] = output(u, k, v, new).astype(outputs[0].dtype)
                state = here(absorb(w, k, v, new), state)
            return state

        return place.in_groups(start, words, False, group, state)

    state = place.read(state_ref, 0), place.full(1.0), place.read(state_ref, 1)
    state = place.through_time(given, made, False, block, state)
    for i, x in enumerate(close_state(state)):
        place.write(last_ref, x, i)


def _backward_kernel(place: Place, others, given, made, rows):
    w_ref, u_ref, starts_ref, adjoint_ref, *words = others
    dw_ref, du_ref, out_ref = rows
    w, u = place.read(w_ref), place.read(u_ref)
    saved = lambda index: tuple(place.read(starts_ref, jnp.maximum(index, 0), i) for i in range(2))

    def block(start, inputs, outputs, carry):
        def group(first, moments, carry):
            adjoint, own = carry
            following = saved(_group(start + first) - 1)        # asked for now, wanted by the group before this
            read = read_group(inputs, first)
            state, kept = open_state(*own), []
            for (k, v, _), (forget, here) in zip(read, moments, strict=True):
                kept.append(forgotten(state, forget))
                state = here(absorb(w, k, v, kept[-1]), state)
            da, db, dw, du = adjoint
            adjoint = da / state[1], db / state[1], dw, du      # from the scale of the next group, where b = 1
            for j in reversed(range(GROUP)):
                forget, here = moments[j]
                dk, dv, (da, db, dw, du) = sweep(w, u, *read[j], kept[j], adjoint)
                outputs[0][first + j] = dk.astype(outputs[0].dtype)
                outputs[1][first + j] = dv.astype(outputs[1].dtype)
                adjoint = here((forget(da, 0.0), forget(db, 0.0), dw, du), adjoint)
            return adjoint, following

        return place.in_groups(start, words, True, group, carry)

    zero = place.full(0.0)
    adjoint = place.read(adjoint_ref, 0), place.read(adjoint_ref, 1), zero, zero
    (da, db, dw, du), _ = place.through_time(given, made, True, block, (adjoint, saved(starts_ref.shape[1] - 1)))
    place.write(dw_ref, dw)
    place.write(du_ref, du)
    for i, x in enumerate((da, db)):
        place.write(out_ref, x, i)


def _group(step):
    return jax.lax.div(jnp.asarray(step, jnp.int32), jnp.int32(GROUP))
