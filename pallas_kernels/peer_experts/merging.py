"""jax.vmap of the expert kernels: more tokens of the same call. B batch, T time, N experts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def merging_tokens(function: Callable) -> Callable:
    """`function(ids, gates, table, *arrays)` of [B, T, ...] arrays; jax.vmap gives it more tokens.

    Tables that differ along the mapped axis are one table of more experts.
    """
    @custom_vmap
    def call(*arrays):
        return function(*arrays)

    @call.def_vmap
    def rule(size, mapped, *arrays):
        ids, gates, table, *rest = (x if m or i == 2 else jnp.broadcast_to(x, (size, *x.shape))
                                    for i, (x, m) in enumerate(zip(arrays, mapped, strict=True)))
        if mapped[2]:
            experts = table.shape[1]
            ids = jnp.minimum(ids, experts - 1) + experts * jnp.arange(size, dtype=ids.dtype)[:, None, None, None]
            table = table.reshape(-1, *table.shape[2:])
        out = call(*(x.reshape(-1, *x.shape[2:]) for x in (ids, gates)), table,
                   *(x.reshape(-1, *x.shape[2:]) for x in rest))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return call
