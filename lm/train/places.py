"""Where the runs of one program lie: a leading axis of places, split over devices that have whole runs each.

No device waits for another within a step. Where the runs do not fill all places, the first one fills the rest, and what
comes out there is dropped: a device that has fewer runs would wait for the others anyway.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.core.axes import RUNS
from lm.core.types import Array


class Places:
    """count: runs. each: places a device. mesh: the devices in use, as few as have `each` places at most."""

    def __init__(self, count: int, devices: Sequence[Any]):
        self.count = count
        self.each = -(-count // len(devices))
        used = -(-count // self.each)
        self.mesh = Mesh(np.array(devices[:used]), (RUNS,), axis_types=(AxisType.Auto,))
        self.split = NamedSharding(self.mesh, PartitionSpec(RUNS))
        self.whole = NamedSharding(self.mesh, PartitionSpec())

    def filled(self, values: Sequence[Any]) -> list[Any]:
        """One for every place, from one for every run."""
        return [*values, *[values[0]] * (self.each * self.mesh.size - self.count)]

    def put(self, trees: Sequence[Any]) -> Any:
        """Trees of arrays, one for every run, as one tree over the devices."""
        return jax.device_put(stack(self.filled(trees)), self.split)

    def take(self, tree: Any, place: int, home: Any) -> Any:
        """What lies at a place, with this sharding."""
        if self.mesh.size == 1:
            return pick(tree, place)
        device = self.mesh.devices.flat[place // self.each]
        local = lambda leaf: next(shard.data for shard in leaf.addressable_shards if shard.device == device)
        return pick(jax.device_put(jax.tree.map(local, tree), home), place % self.each)


@jax.jit
def stack(trees: Sequence[Any]) -> Any:
    """Trees of arrays as one, with a new leading axis."""
    return jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *trees)


@jax.jit
def pick(tree: Any, index: Array) -> Any:
    """The index-th of what `stack` made."""
    return jax.tree.map(lambda leaf: leaf[index], tree)
