"""TPU kernel. B batch, T time, H heads, K key size, V value size; the formula of chunked.py for two heads at a time."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.batching import merged_into_batch
from pallas_kernels.wkv6 import chunk_loop, pair_loop, pair_sweep
from pallas_kernels.wkv6.halving import levels, places, split_at
from pallas_kernels.wkv6.lanes import LANES, Lanes
from pallas_kernels.wkv6.pallas_tpu import unsupported as unsupported
from pallas_kernels.wkv6.vmem_ops import (
    apart,
    first_row,
    halves,
    in_blocks,
    own_blocks,
    pairs_between_halves,
    product,
    swap_blocks,
    together,
)
from pallas_kernels.wkv7 import pair_backward, pair_forward
from pallas_kernels.wkv7.config import TPU
from pallas_kernels.wkv7.solve import inverse

Array = jax.Array
NAMES = ("r", "w", "k", "v", "a", "b")


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
    def run(*inputs):
        *arrays, state, reset = inputs
        lanes, packed = _packed(*arrays)
        tiles = TPU.fitted(lanes.length)
        given = packed, {}, lanes.pack_state(state), reset, save
        if pair_loop.serves(lanes, pair_sweep.TILES, packed["v"].dtype):
            y, last, starts = pair_loop.forward("wkv7_forward", pair_forward.passes, pair_forward.MEMORY, lanes,
                                                pair_sweep.TILES, *given)
        else:
            y, last, starts = chunk_loop.forward("wkv7_forward", chunk, lanes, tiles, *given)
        return lanes.unpack(y, lanes.values), lanes.unpack_state(last), starts

    return run


@merged_into_batch
def _pull(*inputs):
    *arrays, starts, reset, dy, dlast = inputs
    lanes, packed = _packed(*arrays)
    given = packed, {}, starts, reset, lanes.pack(dy, lanes.value), lanes.pack_state(dlast)
    if pair_loop.serves(lanes, pair_sweep.TILES, packed["v"].dtype):
        dx, _, dstate = pair_sweep.backward("wkv7_backward", pair_backward.passes, pair_backward.MEMORY, lanes,
                                            pair_sweep.TILES, *given)
    else:
        dx, _, dstate = chunk_loop.backward("wkv7_backward", chunk, lanes, TPU.fitted(lanes.length), *given)
    width = lambda name: lanes.values if name == "v" else lanes.keys
    return *(lanes.unpack(dx[name], width(name)) for name in NAMES), lanes.unpack_state(dstate)


def _packed(*arrays):
    given = dict(zip(NAMES, arrays, strict=True))
    length, values = given["r"].shape[1], given["v"].shape[-1]
    lanes = Lanes.of(given["r"].shape, values, TPU.fitted(length).tile)
    return lanes, {name: lanes.pack(x, lanes.value if name == "v" else lanes.key) for name, x in given.items()}


def chunk(heads: int, exact: bool, x: dict[str, Array], constants: dict[str, Array], keep: Array | None,
          state: Array) -> tuple[Array, Array]:
    """(y [c, heads V], state after) of one chunk of heads side by side; state [heads V, heads K], block-diagonal.

    Operands of products are rounded to bfloat16 when the inputs were (not `exact`); sums and the state are float32.
    """
    r, k, v, a, b, decay = (x[name] for name in ("r", "k", "v", "a", "b", "w"))
    decay = jnp.exp(decay)
    if keep is not None:
        keep = jnp.tile(keep, (1, r.shape[1] // LANES)) if r.shape[1] > LANES else keep
        a, decay = a * keep, decay * keep
    read = r * decay
    products = levels(decay, swap_blocks)
    whole, length = products[-1], r.shape[0]
    spread = functools.partial(apart, heads)
    row, column = places(heads * length, 2 * length)            # each row with b and with k of its own head
    level_of = split_at(length, row, column)
    columns = lambda x, y: jnp.concatenate([x, y])
    of_r = jnp.where(row % length == column % length, product("nt", exact, spread(r), columns(b, k)), 0)
    of_a = jnp.zeros_like(of_r)
    for level in products[:-1]:
        served = level_of >= level.size         # or a larger level's, which comes after
        after = columns(b * level.after, k * level.after)
        pairs = functools.partial(pairs_between_halves, level.size, exact, heads)
        of_a = jnp.where(served, pairs(a, level.before, after), of_a)
        of_r = jnp.where(served, pairs(read, level.before, after), of_r)
    from_state = product("nt", exact, a * whole.before, state)
    a_b, a_k = halves(of_a)
    removed = from_state + together(heads, product("nn", exact, a_k, v))
    removed = together(heads, solve(length, exact, in_blocks(heads, a_b), spread(removed)))
    y = (product("nt", exact, read * whole.before, state)
         + together(heads, product("nn", exact, of_r, columns(removed, v))))
    added = product("tn", exact, v, k * whole.after) + product("tn", exact, removed, b * whole.after)
    return y, first_row(whole.total) * state + own_blocks(heads, added)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def solve(length: int, exact: bool, a: Array, y: Array) -> Array:
    """solve.py's for blocks of `length` along the diagonal."""
    return _solve_forward(length, exact, a, y)[0]


def _solve_forward(length, exact, a, y):
    inverted = inverse(a, length, functools.partial(product, "nn", exact))
    x = product("nn", exact, inverted, y)
    return x, (inverted, x)


def _solve_backward(length, exact, saved, dx):
    inverted, x = saved
    dy = product("tn", exact, inverted, dx)
    row, column = places(*inverted.shape)
    below = (row > column) & (row // length == column // length)
    return jnp.where(below, product("nt", exact, dy, x), 0), dy


solve.defvjp(_solve_forward, _solve_backward)
