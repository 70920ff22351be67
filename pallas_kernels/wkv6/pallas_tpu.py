"""TPU kernel. B batch, T time, H heads, K key size, V value size; the formula of chunked.py for two heads at a time."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.batching import merged_into_batch
from pallas_kernels.wkv6 import chunk_loop, pair_backward, pair_forward, pair_loop, pair_sweep
from pallas_kernels.wkv6.config import TPU
from pallas_kernels.wkv6.halving import levels, places, split_at
from pallas_kernels.wkv6.lanes import LANES, Lanes
from pallas_kernels.wkv6.vmem_ops import (
    apart,
    first_row,
    own_blocks,
    pairs_between_halves,
    product,
    swap_blocks,
    together,
)

Array = jax.Array


def unsupported(dtype: str, platform: str) -> str | None:
    """Why this kernel cannot serve, or None."""
    if platform != "tpu":
        return f"it needs a TPU and this is {platform}"
    if dtype not in ("float32", "bfloat16"):
        return f"it takes float32 and bfloat16, not {dtype}"
    return dispatch.automatic_axes()


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
        lanes, arrays, constants = _packed(r, w, k, v, u)
        tiles = TPU.fitted(r.shape[1])
        given = lanes, tiles, arrays, constants, lanes.pack_state(state), reset, save
        if pair_loop.serves(lanes, tiles, v.dtype):
            y, last, starts = pair_loop.forward("wkv6_forward", pair_forward.passes, pair_forward.MEMORY, *given)
        else:
            y, last, starts = chunk_loop.forward("wkv6_forward", chunk, *given)
        return lanes.unpack(y, v.shape[-1]), lanes.unpack_state(last), starts

    return run


@merged_into_batch
def _pull(r, w, k, v, u, starts, reset, dy, dlast):
    lanes, arrays, constants = _packed(r, w, k, v, u)
    given = arrays, constants, starts, reset, lanes.pack(dy, lanes.value), lanes.pack_state(dlast)
    if pair_loop.serves(lanes, pair_sweep.TILES, v.dtype):
        dx, dfixed, dstate = pair_sweep.backward("wkv6_backward", pair_backward.passes, pair_backward.MEMORY, lanes,
                                                 pair_sweep.TILES, *given)
    else:
        dx, dfixed, dstate = chunk_loop.backward("wkv6_backward", chunk, lanes, TPU.fitted(r.shape[1]), *given)
    narrow = {name: lanes.unpack(x, v.shape[-1] if name == "v" else r.shape[-1]) for name, x in dx.items()}
    return *(narrow[name] for name in "rwkv"), lanes.unpack(dfixed["u"], r.shape[-1])[:, 0], lanes.unpack_state(dstate)


def _packed(r, w, k, v, u):
    lanes = Lanes.of(r.shape, v.shape[-1], TPU.fitted(r.shape[1]).tile)
    arrays = {name: lanes.pack(x, lanes.key) for name, x in dict(r=r, w=w, k=k).items()}
    constants = lanes._replace(length=1, time=1).pack(u[:, None], lanes.key)
    return lanes, arrays | {"v": lanes.pack(v, lanes.value)}, {"u": constants}


def chunk(heads: int, exact: bool, x: dict[str, Array], constants: dict[str, Array], keep: Array | None,
          state: Array) -> tuple[Array, Array]:
    """(y [c, heads V], state after) of one chunk of heads side by side; state [heads V, heads K], block-diagonal.

    Operands of products are rounded to bfloat16 when the inputs were (not `exact`); sums and the state are float32.
    """
    r, k, v, decay = x["r"], x["k"], x["v"], jnp.exp(x["w"])
    past = r
    if keep is not None:
        keep = jnp.tile(keep, (1, r.shape[1] // LANES)) if r.shape[1] > LANES else keep
        past, decay = r * keep, decay * keep
    products = levels(decay, swap_blocks)
    whole, length = products[-1], r.shape[0]
    row, column = places(heads * length, length)
    level_of = split_at(length, row, column)
    scores = jnp.where(row % length == column, product("nt", exact, apart(heads, r * constants["u"]), k), 0)
    for level in products[:-1]:
        here = pairs_between_halves(level.size, exact, heads, past, level.before, k * level.after)
        scores = jnp.where(level_of >= level.size, here, scores)
    y = product("nt", exact, past * whole.before, state) + together(heads, product("nn", exact, scores, v))
    return y, first_row(whole.total) * state + own_blocks(heads, product("tn", exact, v, k * whole.after))
