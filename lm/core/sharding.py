"""Meshes, and shardings from logical axis names.

The mesh is set with `jax.set_mesh`; nothing here keeps a global of its own. On a single device every function is the
identity, so layers call `constrain` without asking.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.core.axes import BATCH_AXES, MESH_AXES, RULES, RUNS

log = logging.getLogger(__name__)


def resolve_mesh_shape(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """Size of every mesh axis, with at most one -1 filled so that the product is `num_devices`.

    Raises ValueError for an unknown axis, a size below 1 other than -1, two -1, or a product that does not fit.
    """
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise ValueError(f"mesh has no axis {unknown[0]!r}; axes are {', '.join(MESH_AXES)}")
    shape = {axis: int(sizes.get(axis, 1)) for axis in MESH_AXES}
    bad = {axis: n for axis, n in shape.items() if n < 1 and n != -1}
    fill = [axis for axis, n in shape.items() if n == -1]
    if bad or len(fill) > 1:
        raise ValueError(f"mesh sizes must be at least 1, and one of them may be -1 (fill); got {dict(sizes)}")
    known = math.prod(n for n in shape.values() if n != -1)
    if fill and num_devices % known == 0:
        shape[fill[0]] = num_devices // known
    elif fill or known != num_devices:
        raise ValueError(
            f"mesh {dict(sizes)} needs {'a multiple of ' if fill else ''}{known} devices and there are {num_devices}; "
            f"set one axis to -1 to fill, or change the sizes")
    return shape


def make_mesh(sizes: Mapping[str, int], *, dcn: Mapping[str, int] | None = None,
              devices: Sequence[Any] | None = None) -> Mesh:
    """The device mesh. `sizes` are per slice (ICI); `dcn` multiplies axes across slices (default: none).

    `devices` default to all devices of all processes. The order of devices follows the physical topology.
    """
    devices = list(jax.devices() if devices is None else devices)
    dcn = {axis: n for axis, n in (dcn or {}).items() if n != 1}
    slices = {getattr(d, "slice_index", 0) for d in devices}
    if not dcn and len(slices) > 1:
        dcn = {"data": len(slices)}
    across = {axis: int(dcn.get(axis, 1)) for axis in MESH_AXES}
    if unknown := sorted(set(dcn) - set(MESH_AXES)):
        raise ValueError(f"mesh.dcn has no axis {unknown[0]!r}; axes are {', '.join(MESH_AXES)}")
    num_slices = math.prod(across.values())
    if num_slices < 1 or len(devices) % num_slices:
        raise ValueError(f"mesh.dcn {dict(dcn)} needs a multiple of {num_slices} devices and there are {len(devices)}")
    within = resolve_mesh_shape(sizes, len(devices) // num_slices)
    types = (AxisType.Auto,) * len(MESH_AXES)
    if num_slices > 1:
        grid = _grid_of_slices(tuple(within.values()), tuple(across.values()), devices)
    elif len(devices) == 1:
        grid = np.array(devices).reshape(tuple(within.values()))
    else:
        grid = mesh_utils.create_device_mesh(tuple(within.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=types)


def _grid_of_slices(within: tuple[int, ...], across: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """Devices in an array of shape within * across, axis by axis, such that a slice never crosses the slow network.

    A slice is what the devices say (`slice_index` of TPUs), else a process, else a run of neighbours in the list.
    """
    count = math.prod(across)
    for by_process, names in ((False, {getattr(d, "slice_index", 0) for d in devices}),
                              (True, {d.process_index for d in devices})):
        if len(names) == count:
            return mesh_utils.create_hybrid_device_mesh(within, across, devices, process_is_granule=by_process)
    log.info("neither slices nor processes number %d as mesh.dcn says: neighbours in the list of devices count as one "
             "slice", count)
    ranks = len(within)
    grid = np.array(devices).reshape(*across, *within)
    order = [axis for pair in zip(range(ranks), range(ranks, 2 * ranks), strict=True) for axis in pair]
    return grid.transpose(order).reshape([a * w for a, w in zip(across, within, strict=True)])


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh set by `jax.set_mesh`, or None where there is none, it has one device, or devices have whole runs."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.axis_names == (RUNS,) else mesh


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """Partition of an array whose dimensions carry these logical axes.

    A mesh axis is used once, by the first dimension that asks. A dimension that its mesh axes do not divide stays
    whole.
    """
    used: set[str] = set()
    parts: list[Any] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in RULES:
            raise ValueError(f"unknown logical axis {axis!r}; known are {', '.join(RULES)}")
        wanted = tuple(m for m in RULES.get(axis, ()) if m in mesh.shape and mesh.shape[m] > 1 and m not in used)
        if size % math.prod(mesh.shape[m] for m in wanted):
            log.debug("dimension %s of size %d is not divided by mesh axes %s: kept whole", axis, size, wanted)
            wanted = ()
        used.update(wanted)
        parts.append(wanted if len(wanted) > 1 else wanted[0] if wanted else None)
    return PartitionSpec(*parts)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` with its sharding pinned to its logical axes under the current mesh; `x` itself without one."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def axis_size(*names: str) -> int:
    """Number of shards that these mesh axes make together under the current mesh."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape.get(n, 1) for n in names)


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """Sharding of every leaf of a tree whose parameters are boxed with their logical axes (`model.init` gives them).

    Leaves without a box are replicated.
    """
    def one(leaf):
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, spec(leaf.names, leaf.value.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Sharding of a [B, T] array of the batch: rows over the batch axes, time over `context`."""
    return NamedSharding(mesh, spec(("batch", "length"), shape, mesh))


def check_batch(batch_size: int, seq_len: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises ValueError where the batch cannot be split as the mesh says."""
    rows = math.prod(mesh.shape[a] for a in BATCH_AXES)
    if batch_size % microbatches or (batch_size // microbatches) % rows:
        raise ValueError(
            f"train.batch_size={batch_size} in {microbatches} microbatches must be divisible by "
            f"data x fsdp = {rows} rows at a time; use a multiple of {rows * microbatches}")
    if seq_len % mesh.shape["context"]:
        raise ValueError(f"train.seq_len={seq_len} must be divisible by mesh axis context={mesh.shape['context']}")


def platform() -> str:
    """"cpu", "tpu" or "gpu": what the traced computation will run on, by the set mesh, else the default backend."""
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    kind = str(getattr(device, "device_kind", "") or "").lower()
    if "tpu" in kind:
        return "tpu"
    if "nvidia" in kind or "gpu" in kind:
        return "gpu"
    return jax.default_backend()
