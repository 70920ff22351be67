"""Tokens to the MLPs that they chose, or that chose them, and back; every choice is served.

Shapes: M tokens of a device, K experts a token, P = M * K pairs, E experts, D embed_dim, F mlp_dim; B rows of T tokens,
C tokens an expert of a row.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.core.types import Array
from lm.layers.experts.grouped import grouped_matmul


class Experts(NamedTuple):
    """up [E, D, F]; gate [E, D, F] or None; down [E, F, D]. activation: of `gate` where there is one, else of `up`."""

    up: Array
    gate: Array | None
    down: Array
    activation: Callable[[Array], Array]


def by_token(x: Array, ids: Array, gates: Array, experts: Experts) -> Array:
    """y [M, D] = sum over k of gates[k] * expert ids[k] of x [M, D]; ids, gates [M, K], an id of -1 is no expert."""
    M, K = ids.shape
    pairs = jnp.broadcast_to(x[:, None], (M, K, x.shape[1])).reshape(M * K, -1)
    y = of_pairs(pairs, ids.reshape(-1), experts).reshape(M, K, -1)
    return jnp.einsum("mk,mkd->md", gates.astype(y.dtype), y)


def of_pairs(x: Array, ids: Array, experts: Experts) -> Array:
    """[P, D]: expert ids[p] of x[p], 0 where ids [P] is -1."""
    E = experts.up.shape[0]
    bins = jnp.where(ids < 0, E, ids)
    order = jnp.argsort(bins, stable=True)
    back = jnp.argsort(order)
    sizes = jnp.bincount(bins, length=E + 1)[:E].astype(jnp.int32)
    present = jnp.arange(len(ids))[:, None] < sizes.sum()

    def product(a: Array, w: Array) -> Array:
        # Rows of no expert come out undefined, and so do their gradients: neither may reach a nonlinearity or x.
        return jnp.where(present, grouped_matmul(jnp.where(present, a, 0), w.astype(a.dtype), sizes), 0)

    # Each row once: the gradients of these two gathers are scatters without collisions.
    x = x.at[order].get(unique_indices=True)
    up = product(x, experts.up)
    h = experts.activation(up) if experts.gate is None else experts.activation(product(x, experts.gate)) * up
    return product(h, experts.down).at[back].get(unique_indices=True)


def over_devices(x: Array, ids: Array, gates: Array, experts: Experts, axis: str) -> Array:
    """`by_token` with the experts split over the mesh axis, inside `jax.shard_map`; every device of the axis has the
    same tokens and gives the same y.

    A device takes its share of the tokens, sends every pair to the owner of its expert, and gets the results back, in
    two all-to-alls. No pair is dropped: there is room for all pairs of a share to go to one device.
    """
    shards, owned = jax.lax.axis_size(axis), experts.up.shape[0]
    M, K = ids.shape
    share = -(-M // shards)
    pad = lambda a, fill: jnp.pad(a, ((0, share * shards - M), (0, 0)), constant_values=fill)
    mine = lambda a: jax.lax.dynamic_slice_in_dim(a, jax.lax.axis_index(axis) * share, share)
    x, ids, gates = mine(pad(x, 0)), mine(pad(ids, -1)), mine(pad(gates, 0))

    flat = ids.reshape(-1)
    to = jnp.where(flat < 0, shards, flat // owned)  # the owner; nobody
    before = jnp.cumsum(jax.nn.one_hot(to, shards, dtype=jnp.int32), axis=0)
    place = jnp.take_along_axis(before, jnp.minimum(to, shards - 1)[:, None], axis=1)[:, 0] - 1
    pairs = jnp.broadcast_to(x[:, None], (share, K, x.shape[1])).reshape(share * K, -1)
    send = jnp.zeros((shards, share * K, x.shape[1]), x.dtype).at[to, place].set(pairs, mode="drop")
    names = jnp.full((shards, share * K), -1, jnp.int32).at[to, place].set(flat % owned, mode="drop")
    exchange = lambda a: jax.lax.all_to_all(a, axis, 0, 0, tiled=True)
    y = of_pairs(exchange(send).reshape(-1, x.shape[1]), exchange(names).reshape(-1), experts)
    y = exchange(y.reshape(send.shape)).at[to, place].get(mode="fill", fill_value=0).reshape(share, K, -1)
    y = jnp.einsum("mk,mkd->md", gates.astype(y.dtype), y)
    return jax.lax.all_gather(y, axis, tiled=True)[:M]


def by_expert(x: Array, chosen: Array, gates: Array, experts: Experts) -> Array:
    """y [B, T, D]: expert e of row b works on its tokens chosen [B, E, C], and adds gates [B, E, C] times that to
    them; x [B, T, D]."""
    B, E, C = chosen.shape
    rows = jnp.arange(B)[:, None, None]
    mine = x[rows, chosen].transpose(1, 0, 2, 3).reshape(E, B * C, -1)
    product = lambda spec, a, w: jnp.einsum(spec, a, w.astype(a.dtype))
    up = product("epd,edf->epf", mine, experts.up)
    if experts.gate is None:
        h = experts.activation(up)
    else:
        h = experts.activation(product("epd,edf->epf", mine, experts.gate)) * up
    y = product("epf,efd->epd", h, experts.down).reshape(E, B, C, -1).transpose(1, 0, 2, 3)
    return jnp.zeros_like(x).at[rows, chosen].add(gates[..., None].astype(y.dtype) * y)
