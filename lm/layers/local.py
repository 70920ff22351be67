"""Recurrences under a mesh: every device runs the operation on its own rows, channels and stretch of time.

An explicit shard_map: a Pallas kernel cannot be split by the compiler, and a loop over time would be split badly.
"""

import functools
from collections.abc import Callable, Sequence

import jax

from lm.core.axes import RULES
from lm.core.sharding import axis_size, current_mesh, spec
from lm.core.types import Array
from lm.layers.attention_op.sharded import compiler_splits

Axes = Sequence[str | None]


(TIME,) = RULES["length"]


def over_shards(op: Callable, over_sequence: Callable, arrays: Sequence[Array | None], axes: Sequence[Axes],
                out_axes: Sequence[Axes], out_shapes: Sequence[Sequence[int]]) -> tuple[Array, ...]:
    """`op(*arrays)` with every array split as its logical axes say.

    over_sequence: what runs in its place where "length" is split over devices, called with axis_name too; see
    `pallas_kernels/sequence.py`. An array may be None: it is passed as it is. out_axes and out_shapes describe what
    `op` returns.
    """
    if not compiler_splits():
        return op(*arrays)
    mesh = current_mesh()
    given = [n for n, x in enumerate(arrays) if x is not None]
    times = [arrays[n].shape[axes[n].index("length")] for n in given if "length" in axes[n]]
    if axis_size(TIME) > 1 and not any(time % axis_size(TIME) for time in times):
        op = functools.partial(over_sequence, axis_name=TIME)

    def local(*parts):
        full = [None] * len(arrays)
        for n, part in zip(given, parts, strict=True):
            full[n] = part
        return op(*full)

    return jax.shard_map(local, mesh=mesh, in_specs=tuple(spec(axes[n], arrays[n].shape, mesh) for n in given),
                         out_specs=tuple(spec(a, s, mesh) for a, s in zip(out_axes, out_shapes, strict=True)),
                         check_vma=False)(*(arrays[n] for n in given))
