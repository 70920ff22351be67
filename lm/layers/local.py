"""Recurrences under a mesh: every device runs the operation on its own rows and channels, in an explicit shard_map.

A Pallas kernel cannot be split by the compiler, and a loop over time would be split badly.
"""

from collections.abc import Callable, Sequence

import jax

from lm.core.sharding import current_mesh, spec
from lm.core.types import Array
from lm.layers.attention_op.sharded import compiler_splits

Axes = Sequence[str | None]


def over_shards(op: Callable, arrays: Sequence[Array | None], axes: Sequence[Axes], out_axes: Sequence[Axes],
                out_shapes: Sequence[Sequence[int]]) -> tuple[Array, ...]:
    """`op(*arrays)` with every array split as its logical axes say; time ("length") stays whole, since it recurs.

    An array may be None: it is passed as it is. out_axes and out_shapes describe what `op` returns.
    """
    if not compiler_splits():
        return op(*arrays)
    mesh = current_mesh()
    given = [n for n, x in enumerate(arrays) if x is not None]

    def local(*parts):
        full = [None] * len(arrays)
        for n, part in zip(given, parts, strict=True):
            full[n] = part
        return op(*full)

    return jax.shard_map(local, mesh=mesh, in_specs=tuple(spec(axes[n], arrays[n].shape, mesh) for n in given),
                         out_specs=tuple(spec(a, s, mesh) for a, s in zip(out_axes, out_shapes, strict=True)),
                         check_vma=False)(*(arrays[n] for n in given))
