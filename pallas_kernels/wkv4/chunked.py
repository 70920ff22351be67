"""Fast form for every backend of XLA: a loop of one step a trip. B batch, T time, C channels.

The loop slices the [B, T, C] arrays as they lie. Several steps a trip are 5 times slower on CPUs: XLA's CPU backend
fuses the chain of a step into everything that is written after it, exponentials included, again for each.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.wkv4.reference import EMPTY

Array = jax.Array
CHUNK = 64      # steps between saved states, and for how many the backward holds what it computes again


def forward(w: Array, u: Array, k: Array, v: Array, state: Array, reset: Array | None) -> tuple[Array, Array]:
    """y [B, T, C] in v's dtype and the final state [B, 2, C], as in `reference`."""
    carry = (*_open(state), jnp.zeros_like(v))
    *past, y = jax.lax.fori_loop(0, k.shape[1], lambda t, carry: _step(w, u, k, v, reset, t, carry), carry)
    return y, _close(*past)


def forward_saving(w: Array, u: Array, k: Array, v: Array, state: Array,
                   reset: Array | None) -> tuple[Array, Array, Array]:
    """y, the final state, and the states [chunks, B, 2, C] before each chunk of `CHUNK` steps."""
    def chunk(start, length, carry):
        state, y, starts = carry
        starts = _put(starts, state, start // CHUNK, 0)
        *past, y = jax.lax.fori_loop(0, length, lambda i, carry: _step(w, u, k, v, reset, start + i, carry),
                                     (*_open(state), y))
        return _close(*past), y, starts

    whole, tail = divmod(k.shape[1], CHUNK)
    starts = jnp.zeros_like(state, shape=(whole + (tail > 0), *state.shape))
    carry = jax.lax.fori_loop(0, whole, lambda i, carry: chunk(i * CHUNK, CHUNK, carry),
                              (state, jnp.zeros_like(v), starts))
    last, y, starts = chunk(whole * CHUNK, tail, carry) if tail else carry
    return y, last, starts


def backward(w: Array, u: Array, k: Array, v: Array, reset: Array | None, starts: Array, last: Array, dy: Array,
             dlast: Array) -> tuple[Array, Array, Array, Array, Array]:
    """(dw, du, dk, dv, dstate) from the saved states and the cotangents of y and of the final state.

    README.md derives it: (da, db) is the cotangent of the state (a, b) under the scale p that the forward had.
    """
    def remember(start, i, carry):
        """One step again: its state is kept."""
        past, kept = carry
        past = _forget(reset, start + i, *past)
        kept = [_put(x, y, i, 0) for x, y in zip(kept, past, strict=True)]
        return _absorb(w, _at(k, start + i, w), _at(v, start + i, w), *past), kept

    def sweep(start, kept, i, carry):
        """One step from the end."""
        da, db, dw, du, dk, dv = carry
        k_t, v_t, dy_t = (_at(x, start + i, w) for x in (k, v, dy))
        a, b, p = (jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False) for x in kept)
        past, now = _weights(p, u + k_t)
        total = past * b + now
        slope = dy_t / total                                                # dy / d(numerator)
        y = (past * a + now * v_t) / total
        older, newer = _weights(p - w, k_t)
        bonus, faded = now * slope * (v_t - y), older * (da * a + db * b)
        dk = _put(dk, bonus + newer * (da * v_t + db), start + i, 1)
        dv = _put(dv, now * slope + newer * da, start + i, 1)
        da, db = older * da + past * slope, older * db - past * slope * y
        if reset is not None:
            da, db = (jnp.where(_at(reset, start + i)[:, None], 0, x) for x in (da, db))
        return da, db, dw - faded, du + bonus, dk, dv

    def chunk(start, length, carry):
        da, db, *gradients = carry
        past = _open(jax.lax.dynamic_index_in_dim(starts, start // CHUNK, 0, keepdims=False))
        kept = [jnp.zeros_like(w, shape=(length, *w.shape))] * 3
        (_, b, _), kept = jax.lax.fori_loop(0, length, lambda i, carry: remember(start, i, carry), (past, kept))
        return jax.lax.fori_loop(0, length, lambda i, carry: sweep(start, kept, length - 1 - i, carry),
                                 (da / b, db / b, *gradients))

    whole, tail = divmod(k.shape[1], CHUNK)
    mean, dmean, dlog = last[:, 0], dlast[:, 0], dlast[:, 1]
    carry = (dmean, dlog - dmean * mean, jnp.zeros_like(w), jnp.zeros_like(u), jnp.zeros_like(k), jnp.zeros_like(v))
    carry = chunk(whole * CHUNK, tail, carry) if tail else carry
    da, db, dw, du, dk, dv = jax.lax.fori_loop(
        0, whole, lambda i, carry: chunk((whole - 1 - i) * CHUNK, CHUNK, carry), carry)
    return dw, du, dk, dv, jnp.stack([da, da * starts[0, :, 0] + db], axis=1)


def _step(w: Array, u: Array, k: Array, v: Array, reset: Array | None, t, carry):
    *past, y = carry
    a, b, p = _forget(reset, t, *past)
    k_t, v_t = _at(k, t, w), _at(v, t, w)
    past, now = _weights(p, u + k_t)
    y = _put(y, (past * a + now * v_t) / (past * b + now), t, 1)
    return *_absorb(w, k_t, v_t, a, b, p), y


def _absorb(w: Array, k_t: Array, v_t: Array, a: Array, b: Array, p: Array) -> tuple[Array, Array, Array]:
    older, newer = _weights(p - w, k_t)
    return older * a + newer * v_t, older * b + newer, jnp.maximum(p - w, k_t)


def _weights(x: Array, y: Array) -> tuple[Array, Array]:
    """e^x and e^y over the larger of them: one of the two is 1, so one exponential does."""
    first = x >= y
    smaller = jnp.exp(jnp.where(first, y - x, x - y))
    return jnp.where(first, 1, smaller), jnp.where(first, smaller, 1)


def _open(state: Array) -> tuple[Array, Array, Array]:
    return state[:, 0], jnp.ones_like(state[:, 0]), state[:, 1]


def _close(a: Array, b: Array, p: Array) -> Array:
    return jnp.stack([a / b, p + jnp.log(b)], axis=1)


def _forget(reset: Array | None, t, a: Array, b: Array, p: Array) -> tuple[Array, Array, Array]:
    if reset is None:
        return a, b, p
    start = _at(reset, t)[:, None]
    return jnp.where(start, 0, a), jnp.where(start, 1, b), jnp.where(start, EMPTY, p)


def _at(x: Array, t, like: Array | None = None) -> Array:
    """x at step t, [B, ...], in the dtype of `like`."""
    x = jax.lax.dynamic_index_in_dim(x, t, 1, keepdims=False)
    return x if like is None else x.astype(like.dtype)


def _put(out: Array, x: Array, index, axis: int) -> Array:
    return jax.lax.dynamic_update_index_in_dim(out, x.astype(out.dtype), index, axis)
