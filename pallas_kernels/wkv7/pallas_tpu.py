"""TPU kernel. B batch, T time, H heads, K key size, V value size; the formula of chunked.py for two heads at a time."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.batching import merged_into_batch
from pallas_kernels.wkv6 import chunk_loop
from pallas_kernels.wkv6.halving import levels, pairs, places
from pallas_kernels.wkv6.lanes import LANES, Lanes
from pallas_kernels.wkv6.pallas_tpu import unsupported as unsupported
from pallas_kernels.wkv6.vmem_ops import apart, first_row, own_blocks, product, swap_blocks, together
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
        y, last, starts = chunk_loop.forward("wkv7_forward", chunk, lanes, TPU.fitted(lanes.length), packed, {},
                                             lanes.pack_state(state), reset, save)
        return lanes.unpack(y, lanes.values), lanes.unpack_state(last), starts

    return run


@merged_into_batch
def _pull(*inputs):
    *arrays, starts, reset, dy, dlast = inputs
    lanes, packed = _packed(*arrays)
    dx, _, dstate = chunk_loop.backward("wkv7_backward", chunk, lanes, TPU.fitted(lanes.length), packed, {}, starts,
                                        reset, lanes.pack(dy, lanes.value), lanes.pack_state(dlast))
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

    What only y reads may be rounded to bfloat16 when y is (not `exact`); what the state depends on is float32.
    """
    r, k, v, a, b, decay = (x[name] for name in ("r", "k", "v", "a", "b", "w"))
    decay = jnp.exp(decay)
    if keep is not None:
        keep = jnp.tile(keep, (1, r.shape[1] // LANES)) if r.shape[1] > LANES else keep
        a, decay = a * keep, decay * keep
    read = r * decay
    products = levels(decay, swap_blocks)
    whole, length = products[-1], r.shape[0]
    row, column = places(heads * length, heads * length)
    same, diagonal = row // length == column // length, row == column
    spread = functools.partial(apart, heads)
    r_b, r_k = (jnp.where(diagonal, product("nt", exact, spread(r), spread(y)), 0) for y in (b, k))
    a_b = a_k = jnp.zeros_like(r_b)
    for level in products[:-1]:
        served = pairs(level.size, length, row, column) & same
        b_after, k_after = spread(b * level.after), spread(k * level.after)
        a_before, r_before = spread(a * level.before), spread(read * level.before)
        a_b = jnp.where(served, product("nt", True, a_before, b_after), a_b)
        a_k = jnp.where(served, product("nt", True, a_before, k_after), a_k)
        r_b = jnp.where(served, product("nt", exact, r_before, b_after), r_b)
        r_k = jnp.where(served, product("nt", exact, r_before, k_after), r_k)
    values = spread(v)
    from_state = spread(product("nt", True, a * whole.before, state))
    removed = solve(length, a_b, from_state + product("nn", True, a_k, values))
    y = (product("nt", exact, read * whole.before, state)
         + together(heads, product("nn", exact, r_b, removed) + product("nn", exact, r_k, values)))
    added = product("tn", True, v, k * whole.after) + product("tn", True, together(heads, removed), b * whole.after)
    return y, first_row(whole.total) * state + own_blocks(heads, added)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def solve(length: int, a: Array, y: Array) -> Array:
    """solve.py's for blocks of `length` along the diagonal."""
    return _solve_forward(length, a, y)[0]


def _solve_forward(length, a, y):
    inverted = inverse(a, length, functools.partial(product, "nn", True))
    x = product("nn", True, inverted, y)
    return x, (inverted, x)


def _solve_backward(length, saved, dx):
    inverted, x = saved
    dy = product("tn", True, inverted, dx)
    row, column = places(*inverted.shape)
    below = (row > column) & (row // length == column // length)
    return jnp.where(below, product("nt", True, dy, x), 0), dy


solve.defvjp(_solve_forward, _solve_backward)
