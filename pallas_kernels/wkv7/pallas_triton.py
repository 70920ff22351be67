"""Triton kernels, for NVIDIA GPUs of compute capability 8.0 and up: the recurrence step by step, state in registers.

The loops are those of `pallas_kernels/triton_states.py`. B batch, T time, H heads, K key size, V value size.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import gpu, triton_states
from pallas_kernels.batching import merged_into_batch
from pallas_kernels.triton_rows import restarts
from pallas_kernels.triton_states import GROUP, SPAN, VALUES, across, down, padded, padded_state

Array = jax.Array
WARPS, WARPS_BACK = 1, 8
unsupported = triton_states.unsupported


@jax.custom_vjp
def forward(r: Array, w: Array, k: Array, v: Array, a: Array, b: Array, state: Array,
            reset: Array | None) -> tuple[Array, Array]:
    """y [B, T, H, V] in r's dtype and the final state [B, H, K, V] in float32."""
    return _run(False)(r, w, k, v, a, b, state, reset)[:2]


def _forward(r, w, k, v, a, b, state, reset):
    y, last, starts = _run(True)(r, w, k, v, a, b, state, reset)
    return (y, last), (r, w, k, v, a, b, starts, reset)


def _backward(saved, cotangents):
    return (*_pull(*saved, *cotangents), None)


forward.defvjp(_forward, _backward)


@functools.cache
def _run(save: bool):
    @merged_into_batch
    def run(r, w, k, v, a, b, state, reset):
        (_, length, _, keys), values = r.shape, v.shape[-1]
        r, w, k, v, a, b, state = *map(padded, (r, w, k, v, a, b)), padded_state(state)
        words = [] if reset is None else [gpu.reset_words(reset)]
        made = [gpu.like(state)]
        if save:
            made.append(gpu.like(state, *state.shape[:2], triton_states.spans(r.shape[1]), *state.shape[2:]))
        y, last, *starts = triton_states.call(functools.partial(_forward_kernel, len(words)), "wkv7_forward", WARPS,
                                              VALUES, [r, w, k, a, b], [v], [state], words, [],
                                              [gpu.like(v, dtype=r.dtype)], made)
        return y[:, :length, :, :values], last[:, :, :keys, :values], *starts

    return run


@merged_into_batch
def _pull(r, w, k, v, a, b, starts, reset, dy, dlast):
    (_, length, _, keys), values = r.shape, v.shape[-1]
    r, w, k, v, a, b, dy, dlast = *map(padded, (r, w, k, v, a, b, dy)), padded_state(dlast)
    words = [] if reset is None else [gpu.reset_words(reset)]
    scratch = gpu.like(dlast, *dlast.shape[:2], SPAN, *dlast.shape[2:])
    dr, dw, dk, da, db, dv, dstate, _ = triton_states.call(
        functools.partial(_backward_kernel, len(words)), "wkv7_backward", WARPS_BACK, None, [r, w, k, a, b], [v, dy],
        [starts, dlast], words, [gpu.like(x) for x in (r, w, k, a, b)], [gpu.like(v)], [gpu.like(dlast), scratch])
    cut = lambda x: x[:, :length, :, :keys]
    return (cut(dr), cut(dw), cut(dk), dv[:, :length, :, :values], cut(da), cut(db), dstate[:, :, :keys, :values])


def _next(w: Array, k: Array, v: Array, a: Array, b: Array, state: Array) -> tuple[Array, Array]:
    """(the state after, what is removed)."""
    removed = jnp.sum(down(a) * state, axis=0)
    return down(jnp.exp(w)) * state + down(b) * across(removed) + down(k) * across(v), removed


def _forward_kernel(num_words: int, r_ref, w_ref, k_ref, a_ref, b_ref, v_ref, state_ref, *refs):
    words, (y_ref, last_ref, *starts_ref) = refs[:num_words], refs[num_words:]

    def group(start, state):
        for j, (r, *row) in enumerate(triton_states.read((r_ref, w_ref, k_ref, v_ref, a_ref, b_ref), start)):
            state, _ = _next(*row, restarts(words, start, j)(state, 0.0))
            y_ref[start + j] = jnp.sum(state * down(r), axis=0).astype(y_ref.dtype)
        return state

    def save(span, state):
        for ref in starts_ref:
            ref[span] = state

    last_ref[...] = triton_states.forwards(y_ref.shape[0], group, save, state_ref[...])


def _backward_kernel(num_words: int, r_ref, w_ref, k_ref, a_ref, b_ref, v_ref, dy_ref, starts_ref, dlast_ref, *refs):
    """README.md derives it."""
    words, refs = refs[:num_words], refs[num_words:]
    dr_ref, dw_ref, dk_ref, da_ref, db_ref, dv_ref, dstate_ref, scratch_ref = refs
    given = w_ref, k_ref, v_ref, a_ref, b_ref

    def group(start, state):
        for j, row in enumerate(triton_states.read(given, start)):
            state, _ = _next(*row, restarts(words, start, j)(state, 0.0))
        return state

    def pull(start, state, dstate):
        rows, states, removed = triton_states.read((*given, r_ref, dy_ref), start), [], []
        forget = [restarts(words, start, j) for j in range(GROUP)]
        by_value = lambda x, row: jnp.sum(x * across(row), axis=1)
        for j, (*row, _, dy) in enumerate(rows):
            states.append(forget[j](state, 0.0))
            state, gone = _next(*row, states[-1])
            removed.append(gone)
            dr_ref[start + j] = by_value(state, dy).astype(dr_ref.dtype)
        for j in reversed(range(GROUP)):
            (w, k, v, a, b, r, dy), before = rows[j], states[j]
            decay = jnp.exp(w)
            dstate = dstate + down(r) * across(dy)
            pulled = jnp.sum(dstate * down(b), axis=0)
            for ref, x in ((dk_ref, by_value(dstate, v)), (db_ref, by_value(dstate, removed[j])),
                           (da_ref, by_value(before, pulled)), (dv_ref, jnp.sum(dstate * down(k), axis=0)),
                           (dw_ref, decay * jnp.sum(dstate * before, axis=1))):
                ref[start + j] = x.astype(ref.dtype)
            dstate = forget[j](down(decay) * dstate + down(a) * across(pulled), 0.0)
        return dstate

    dstate_ref[...] = triton_states.backwards(dr_ref.shape[0], group, pull, starts_ref, scratch_ref, dlast_ref[...])
