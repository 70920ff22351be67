"""Running a function of local arrays under a mesh: kernels and loops that the compiler cannot split by itself.

Shape legend: B batch, T queries, S keys, H heads, G key-value heads, K head_dim.
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec

from lm.core.sharding import current_mesh, spec

Array = jax.Array


def compiler_splits() -> bool:
    """Whether the compiler splits arrays over devices here: a mesh of several devices, outside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    automatic = [size for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True) if kind != AxisType.Manual]
    return math.prod(automatic) > 1


def partition(q: Array, k: Array, length: str | None) -> PartitionSpec:
    """How [B, T, heads, K] arrays are split: rows over the batch axes, heads over `tensor`, time over axis `length`.

    Heads are split only where k has a multiple (then q has too); q and k are split alike, so that groups stay together.
    """
    mesh = current_mesh()
    heads = "heads" if k.shape[2] % mesh.shape.get("tensor", 1) == 0 else None
    return spec(("batch", length, heads, None), q.shape, mesh)


def over_shards(local: Callable, q: Array, k: Array, v: Array, documents: tuple[Array | None, Array | None],
                length: str | None = None) -> Array:
    """`local(q, k, v, documents)` on every shard's part of the arrays, documents being [B, T] of queries and of keys.

    `length`: "length" splits time too (`local` must then talk to the other shards); None keeps it whole.
    """
    if not compiler_splits():
        return local(q, k, v, documents)
    split = partition(q, k, length)
    rows = PartitionSpec(*split[:2])
    return jax.shard_map(local, mesh=current_mesh(), in_specs=(split, split, split, rows), out_specs=split,
                         check_vma=False)(q, k, v, documents)
