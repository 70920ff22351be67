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
def forward(r: Array, w: Array, k: Array, v: Array, u: Array, state: Array,
            reset: Array | None) -> tuple[Array, Array]:
    """y [B, T, H, V] in r's dtype and the final state [B, H, K, V] in float32. u [B, H, K] in float32."""
    return _run(False)(r, w, k, v, u, state, reset)[:2]


def _forward(r, w, k, v, u, state, reset):
    y, last, starts = _run(True)(r, w, k, v, u, state, reset)
    return (y, last), (r, w, k, v, u, starts, reset)


def _backward(saved, cotangents):
    return (*_pull(*saved, *cotangents), None)


forward.defvjp(_forward, _backward)


@functools.cache
def _run(save: bool):
    @merged_into_batch
    def run(r, w, k, v, u, state, reset):
        (_, length, _, keys), values = r.shape, v.shape[-1]
        r, w, k, v, u, state = *map(padded, (r, w, k, v)), _padded(u), padded_state(state)
        words = [] if reset is None else [gpu.reset_words(reset)]
        made = [gpu.like(state)]
        if save:
            made.append(gpu.like(state, *state.shape[:2], triton_states.spans(r.shape[1]), *state.shape[2:]))
        y, last, *starts = triton_states.call(functools.partial(_forward_kernel, len(words)), "wkv6_forward", WARPS,
                                              VALUES, [r, w, k], [v], [u, state], words, [],
                                              [gpu.like(v, dtype=r.dtype)], made)
        return y[:, :length, :, :values], last[:, :, :keys, :values], *starts

    return run


@merged_into_batch
def _pull(r, w, k, v, u, starts, reset, dy, dlast):
    (_, length, _, keys), values = r.shape, v.shape[-1]
    r, w, k, v, dy, u, dlast = *map(padded, (r, w, k, v, dy)), _padded(u), padded_state(dlast)
    words = [] if reset is None else [gpu.reset_words(reset)]
    scratch = gpu.like(dlast, *dlast.shape[:2], SPAN, *dlast.shape[2:])
    dr, dw, dk, dv, du, dstate, _ = triton_states.call(
        functools.partial(_backward_kernel, len(words)), "wkv6_backward", WARPS_BACK, None, [r, w, k], [v, dy],
        [u, starts, dlast], words, [gpu.like(r), gpu.like(w), gpu.like(k)], [gpu.like(v)],
        [gpu.like(u), gpu.like(dlast), scratch])
    cut = lambda x: x[:, :length, :, :keys]
    return cut(dr), cut(dw), cut(dk), dv[:, :length, :, :values], du[..., :keys], dstate[:, :, :keys, :values]


def _padded(u: Array) -> Array:
    return jnp.pad(u, ((0, 0), (0, 0), (0, triton_states.size(u.shape[2]) - u.shape[2])))


def _next(w: Array, k: Array, v: Array, state: Array) -> Array:
    return down(jnp.exp(w)) * state + down(k) * across(v)


def _forward_kernel(num_words: int, r_ref, w_ref, k_ref, v_ref, u_ref, state_ref, *refs):
    words, (y_ref, last_ref, *starts_ref) = refs[:num_words], refs[num_words:]
    u = u_ref[...]

    def group(start, state):
        for j, (r, w, k, v) in enumerate(triton_states.read((r_ref, w_ref, k_ref, v_ref), start)):
            state = restarts(words, start, j)(state, 0.0)
            y = jnp.sum(state * down(r), axis=0) + jnp.sum(r * u * k) * v
            y_ref[start + j] = y.astype(y_ref.dtype)
            state = _next(w, k, v, state)
        return state

    def save(span, state):
        for ref in starts_ref:
            ref[span] = state

    last_ref[...] = triton_states.forwards(y_ref.shape[0], group, save, state_ref[...])


def _backward_kernel(num_words: int, r_ref, w_ref, k_ref, v_ref, dy_ref, u_ref, starts_ref, dlast_ref, *refs):
    """README.md derives it."""
    words, (dr_ref, dw_ref, dk_ref, dv_ref, du_ref, dstate_ref, scratch_ref) = refs[:num_words], refs[num_words:]
    u = u_ref[...]

    def group(start, state):
        for j, (w, k, v) in enumerate(triton_states.read((w_ref, k_ref, v_ref), start)):
            state = _next(w, k, v, restarts(words, start, j)(state, 0.0))
        return state

    def pull(start, state, carry):
        rows, states = triton_states.read((r_ref, w_ref, k_ref, v_ref, dy_ref), start), []
        forget = [restarts(words, start, j) for j in range(GROUP)]
        for (_, w, k, v, _), without in zip(rows, forget, strict=True):
            states.append(without(state, 0.0))
            state = _next(w, k, v, states[-1])
        dstate, du = carry
        for j in reversed(range(GROUP)):
            (r, w, k, v, dy), state = rows[j], states[j]
            newest, decay = jnp.sum(v * dy), jnp.exp(w)
            dr = jnp.sum(state * across(dy), axis=1) + newest * u * k
            dk = jnp.sum(dstate * across(v), axis=1) + newest * u * r
            dv = jnp.sum(dstate * down(k), axis=0) + jnp.sum(r * u * k) * dy
            dw = decay * jnp.sum(dstate * state, axis=1)
            for ref, x in ((dr_ref, dr), (dw_ref, dw), (dk_ref, dk), (dv_ref, dv)):
                ref[start + j] = x.astype(ref.dtype)
            dstate, du = forget[j](down(decay) * dstate + down(r) * across(dy), 0.0), du + newest * r * k
        return dstate, du

    dstate_ref[...], du_ref[...] = triton_states.backwards(dr_ref.shape[0], group, pull, starts_ref, scratch_ref,
                                                           (dlast_ref[...], jnp.zeros_like(u)))
