"""Parameters that every device holds whole because a mesh axis does not divide them: a mesh that runs out of memory."""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from lm.core.axes import RULES
from lm.core.sharding import spec

LEAST = 0.01    # of all parameters: what is less is not worth a word


class Undivided(NamedTuple):
    """axis, size: of the mesh. dims: names and sizes of the dimensions that it would split. whole, total: parameters
    that it leaves whole, and all. divisor: the largest part of the size that divides all of these."""

    axis: str
    size: int
    dims: Mapping[str, int]
    whole: int
    total: int
    divisor: int

    def __str__(self) -> str:
        dims = ", ".join(f"{name}={size}" for name, size in sorted(self.dims.items()))
        other = f"; the largest part of it that does is {self.divisor}" if self.divisor > 1 else ""
        rest = (f": mesh.{self.axis}={self.divisor} and mesh.data={self.size // self.divisor} times as large"
                if self.divisor > 1 and self.axis != "data" else "")
        return (f"mesh.{self.axis}={self.size} does not divide {dims}: every device holds {self.whole:,} of "
                f"{self.total:,} parameters undivided by it{other}{rest}")


def undivided(boxed: Any, mesh: Mapping[str, int]) -> list[Undivided]:
    """One of these for each axis of the mesh (name to size) that at least 1% of the parameters name and none of their
    dimensions is split over. boxed: a tree of parameters, or their shapes, boxed with their logical axes."""
    sizes = SimpleNamespace(shape=dict(mesh))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    total, whole, dims, divisors = 0, {}, {}, {}
    for leaf in leaves:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            total += leaf.size
            continue
        named = list(zip(leaf.names, leaf.value.shape, strict=True))
        total += leaf.value.size
        split = {axis for part in spec(leaf.names, leaf.value.shape, sizes)
                 for axis in ((part,) if isinstance(part, str) else part or ())}
        for axis in {axis for name, _ in named for axis in RULES.get(name, ()) if mesh.get(axis, 1) > 1} - split:
            asking = {name: size for name, size in named if axis in RULES.get(name, ())}
            best = max(math.gcd(size, mesh[axis]) for size in asking.values())
            whole[axis] = whole.get(axis, 0) + leaf.value.size
            dims.setdefault(axis, {}).update(asking)
            divisors[axis] = math.gcd(divisors.get(axis, 0), best)
    return [Undivided(axis, mesh[axis], dims[axis], count, total, divisors[axis]) for axis, count in whole.items()
            if count >= LEAST * total]
