"""Block sliding-window attention under a mesh: every device works on its own rows, heads and stretch of time.

Where the mesh axis `context` splits time, a device fetches the keys that its first queries look back to from the
devices before it: one hop where its stretch is longer than the window.

Shape legend: as `bands`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm.core.axes import RULES
from lm.core.sharding import axis_size, current_mesh, spec
from lm.layers.attention_op.sharded import compiler_splits
from lm.layers.block_sliding.bands import Columns, Keys, Queries

Array = jax.Array
(TIME,) = RULES["length"]


def over_shards(local: Callable[..., Array], q: Queries, new: Keys, past: Keys, columns: Columns | None, *, block: int,
                behind: int) -> Array:
    """`local(q, new, past, columns, block=, behind=)`, split as the mesh says.

    Time is split where a row begins with the call, as in training; with keys of before, or columns, every device has
    the whole of it.
    """
    local = functools.partial(local, block=block, behind=behind)
    if not compiler_splits():
        return local(q, new, past, columns)
    mesh, shards = current_mesh(), axis_size(TIME)
    heads = "heads" if new.keys.shape[2] % mesh.shape.get("tensor", 1) == 0 else None
    T = q.order.shape[1]
    split = shards > 1 and T % shards == 0 and columns is None and past.order.shape[1] == 0
    time = "length" if split else None

    def specs(tree, axis):
        wide = lambda x: ("batch", axis, heads, None) if x.ndim == 4 else ("batch", axis)
        return type(tree)(*(spec(wide(x), x.shape, mesh) for x in tree))

    run = local
    if split:
        # Chunks begin anew on each device: if not where blocks do, a query may reach into one chunk more.
        reach = behind if T // shards % block == 0 else behind + 1

        def run(q, new, past, columns):
            return local(q, new, fetched(new, reach * block), columns, behind=reach)

    extra = None if columns is None else Columns(*(
        spec((None, "batch", None, heads if x.ndim == 5 else None), x.shape[:4], mesh) for x in columns))
    return jax.shard_map(run, mesh=mesh, in_specs=(specs(q, time), specs(new, time), specs(past, None), extra),
                         out_specs=specs(q, time).queries, check_vma=False)(q, new, past, columns)


def fetched(own: Keys, size: int) -> Keys:
    """The `size` keys before this device's own, from the devices before it; empty where there are none."""
    shards, length = axis_size(TIME), own.order.shape[1]
    hops = min(-(-size // length), shards - 1)
    # A device that nothing is sent to receives zeros; document 0 is that of no key on the way.
    sent = own._replace(document=own.document + 1)
    pieces = [jax.tree.map(lambda x, hop=hop: jax.lax.ppermute(x, TIME, [(r, r + hop) for r in range(shards - hop)]),
                           sent) for hop in range(hops, 0, -1)]
    if not pieces:
        return jax.tree.map(lambda x: x[:, :0], own)
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1)[:, -size:], *pieces)
    missing = size - joined.order.shape[1]
    joined = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (missing, 0), *[(0, 0)] * (x.ndim - 2))), joined)
    return joined._replace(document=joined.document - 1)
