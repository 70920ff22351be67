"""Fast form for every backend of XLA: blocks of `BLOCK` steps read and written in place. B batch, T time, C channels.

No transposes: a loop slices the [B, T, C] arrays as they lie. Eight unrolled steps are one fused loop body; in sixteen
XLA's CPU backend computes the chain again for every step that is written, and the time doubles.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.linear_scan.gates import Gates

Array = jax.Array
BLOCK = 8


def forward(a: Array, b: Array, h0: Array, reset: Array | None) -> tuple[Array, Array]:
    """h [B, T, C] in b's dtype and the final state [B, C] in h0's dtype, which is the dtype of the recurrence."""
    return _scan(lambda a, b: (a, b), (a, b), h0, reset)


def gated_forward(gates: Gates, inputs: tuple[Array, ...], h0: Array, reset: Array | None) -> tuple[Array, Array]:
    """The same with (a, b) = gates(*inputs), computed block by block."""
    return _scan(gates, inputs, h0, reset)


def backward(a: Array, h: Array, h0: Array, reset: Array | None, dh: Array,
             dh_last: Array) -> tuple[Array, Array, Array]:
    """(da, db, dh0) from the saved h and the cotangents of h and of the final state: README.md derives it."""
    # b's gradient keeps mu's width here: a's is the product of it with the states before, in one pass afterwards.
    db, dh0 = _reversed_scan(lambda a: a, (a,), reset, dh, dh_last)
    return (db * _states_before(h, h0, reset)).astype(a.dtype), db.astype(dh.dtype), dh0


def gated_backward(gates: Gates, inputs: tuple[Array, ...], h: Array, h0: Array, reset: Array | None, dh: Array,
                   dh_last: Array) -> tuple[tuple[Array, ...], Array]:
    """(gradients of the inputs, dh0): a in the loop, and what follows from a's and b's gradients in one pass after."""
    db, dh0 = _reversed_scan(gates.decay, inputs, reset, dh, dh_last)
    wide = tuple(x.astype(h0.dtype) for x in inputs)
    gradients = gates.pull(wide, db * _states_before(h, h0, reset), db)
    return tuple(g.astype(x.dtype) for g, x in zip(gradients, inputs, strict=True)), dh0


def _scan(gates: Callable, inputs: tuple[Array, ...], h0: Array, reset: Array | None) -> tuple[Array, Array]:
    def block(start, length, carry):
        h, out = carry
        a_block, b_block = gates(*(_part(x, start, length).astype(h.dtype) for x in inputs))
        keep = _keep(reset, start, length)
        steps = []
        for j in range(length):
            h = a_block[:, j] * keep(j, h) + b_block[:, j]
            steps.append(h)
        return h, _write(out, steps, start)

    size, whole, tail = _blocks(inputs[0].shape[1])
    carry = jax.lax.fori_loop(0, whole, lambda i, carry: block(i * size, size, carry), (h0, jnp.zeros_like(inputs[-1])))
    h_last, h = block(whole * size, tail, carry)
    return h, h_last


def _reversed_scan(decay: Callable, inputs: tuple[Array, ...], reset: Array | None, dh: Array,
                   dh_last: Array) -> tuple[Array, Array]:
    """(gradient of b in dh_last's dtype, of h0) with a = decay(*inputs)."""
    def block(start, length, carry):
        mu, db = carry
        a_block = decay(*(_part(x, start, length).astype(mu.dtype) for x in inputs))
        dh_block = _part(dh, start, length).astype(mu.dtype)
        keep = _keep(reset, start, length)
        steps = []
        for j in reversed(range(length)):
            steps.append(dh_block[:, j] + mu)
            mu = keep(j, a_block[:, j] * steps[-1])
        return mu, _write(db, steps[::-1], start)

    size, whole, tail = _blocks(dh.shape[1])
    carry = block(whole * size, tail, (dh_last, jnp.zeros_like(dh, dh_last.dtype)))
    dh0, db = jax.lax.fori_loop(0, whole, lambda i, carry: block((whole - 1 - i) * size, size, carry), carry)
    return db, dh0


def _states_before(h: Array, h0: Array, reset: Array | None) -> Array:
    """h_{t-1} for every t, 0 where a document starts."""
    before = jnp.concatenate([h0[:, None], h[:, :-1].astype(h0.dtype)], axis=1)
    return before if reset is None else jnp.where(reset[..., None], 0, before)


def _blocks(length: int) -> tuple[int, int, int]:
    """Steps of a block, number of whole blocks, steps after them."""
    size = min(BLOCK, length)
    return size, *divmod(length, size)


def _part(x: Array, start, length: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, length, axis=1)


def _keep(reset: Array | None, start, length: int) -> Callable[[int, Array], Array]:
    """keep(j, x): x [B, C] with 0 in the rows that reset at step j of the block."""
    if reset is None:
        return lambda j, x: x
    block = _part(reset, start, length)[..., None]
    return lambda j, x: jnp.where(block[:, j], 0, x)


def _write(out: Array, steps: list[Array], start) -> Array:
    if not steps:
        return out
    return jax.lax.dynamic_update_slice_in_dim(out, jnp.stack(steps, axis=1).astype(out.dtype), start, axis=1)
