"""Triton kernels, for NVIDIA GPUs of compute capability 8.0 and up: a program is one token.

M tokens, P = heads * k experts a token, N experts, D width. The rows of a group of experts are gathered into registers,
used for the products with x (and dy) and for the sums, and never written: [M, P, D] is held nowhere. Several programs
on a multiprocessor hide each other's gathers.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import gpu
from pallas_kernels.peer_experts.merging import merging_tokens

Array = jax.Array
WARPS = 4
GROUP_BYTES = 2 ** 13       # of the down rows of a group of experts, and of the up rows: 16 registers a thread each
DOWN, UP = range(2)


def unsupported(dtypes: dict[str, str], kinds: int, width: int, platform: str) -> str | None:
    """Why these kernels cannot serve, or None."""
    for name, dtype in dtypes.items():
        reason = gpu.no_triton(dtype, platform)
        if reason:
            return f"{name}: {reason}" if "takes" in reason else reason
    if kinds != 2:
        return "it takes tables [N, 2, D], without GLU"
    if width & (width - 1) or not 128 <= width <= 4096:
        return f"D={width} is not a power of two from 128 to 4096, as tensors of Triton are"
    return None


def forward(activation: Callable, x: Array, ids: Array, gates: Array, table: Array) -> Array:
    """y [B, T, D] in x's dtype. ids [B, T, P] outside of the table have gates of 0."""
    y, = merging_tokens(functools.partial(_call, "forward", activation))(ids, gates, table, x)
    return y


def backward(activation: Callable, x: Array, ids: Array, gates: Array, table: Array,
             dy: Array) -> tuple[Array, Array, Array]:
    """(dx, dgates, factors) as in `chunked.backward`."""
    call = merging_tokens(functools.partial(_call, "backward", activation))
    dx, dgates, *factors = call(ids, gates, table, x, jnp.asarray(dy))
    return dx, dgates.astype(gates.dtype), jnp.stack(factors, axis=-1)


def _call(direction: str, activation: Callable, ids: Array, gates: Array, table: Array, *given: Array) -> list[Array]:
    """given: x, or x and dy, [B, T, D]. Returns [y], or [dx, dgates, factors of down, of up]."""
    from jax.experimental.pallas import triton as plt
    shape, chosen = ids.shape, ids.shape[-1]
    group = max(1, GROUP_BYTES // (table.shape[-1] * table.dtype.itemsize))
    flat = lambda a, more=0: jnp.pad(a.reshape(-1, a.shape[-1]), ((0, 0), (0, more)))
    ids = flat(jnp.minimum(ids, table.shape[0] - 1), -chosen % group)       # more experts with gates of 0
    gates, given = flat(gates.astype(jnp.float32), -chosen % group), [flat(a) for a in given]
    token = lambda a: pl.BlockSpec((None, a.shape[1]), lambda i: (i, 0))
    kernel = {"forward": _forward_kernel, "backward": _backward_kernel}[direction]
    outputs = [gpu.like(given[0]), *[gpu.like(gates)] * (0 if direction == "forward" else 3)]
    out = pl.pallas_call(
        functools.partial(kernel, activation, group), grid=(ids.shape[0],),
        in_specs=[token(ids), token(gates), pl.BlockSpec(memory_space=pl.ANY), *map(token, given)],
        out_specs=[token(x) for x in outputs], out_shape=outputs, name=f"peer_experts_{direction}",
        interpret=gpu.interpret_triton(), compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
    )(ids, gates, table, *given)
    y, *scalars = out
    return [y.reshape(*shape[:2], -1), *(x[:, :chosen].reshape(shape) for x in scalars)]


def _forward_kernel(activation: Callable, group: int, ids_ref, gates_ref, table_ref, x_ref, y_ref):
    x = x_ref[...].astype(jnp.float32)

    def some(i, y):
        at = pl.ds(i * group, group)
        ids = ids_ref[at]
        inner = _products(_rows(table_ref, ids, DOWN), x)
        return y + _sum(_rows(table_ref, ids, UP), gates_ref[at] * activation(inner))

    y = jax.lax.fori_loop(0, ids_ref.shape[0] // group, some, jnp.zeros_like(x))
    y_ref[...] = y.astype(y_ref.dtype)


def _backward_kernel(activation: Callable, group: int, ids_ref, gates_ref, table_ref, x_ref, dy_ref, dx_ref, dgates_ref,
                     down_ref, up_ref):
    """README.md derives it."""
    x, dy = x_ref[...].astype(jnp.float32), dy_ref[...].astype(jnp.float32)

    def some(i, dx):
        at = pl.ds(i * group, group)
        ids, gates = ids_ref[at], gates_ref[at]
        rows = _rows(table_ref, ids, DOWN)
        slope = _products(_rows(table_ref, ids, UP), dy)
        hidden, pull = jax.vjp(activation, _products(rows, x))
        down, = pull(gates * slope)
        dgates_ref[at], down_ref[at], up_ref[at] = hidden * slope, down, gates * hidden
        return dx + _sum(rows, down)

    dx = jax.lax.fori_loop(0, ids_ref.shape[0] // group, some, jnp.zeros_like(x))
    dx_ref[...] = dx.astype(dx_ref.dtype)


def _rows(table_ref, ids: Array, kind: int) -> Array:
    """[experts, D] in float32."""
    return table_ref[ids, kind, :].astype(jnp.float32)


def _products(rows: Array, x: Array) -> Array:
    return jnp.sum(rows * x[None, :], axis=1)


def _sum(rows: Array, weights: Array) -> Array:
    return jnp.sum(rows * weights[:, None], axis=0)
