"""TPU slices by the names that people use: v5e-256, v4-32, v5litepod-16, or a generation with a topology, v5p:4x4x8.

Google counts cores in the names of v4 and v5p (v4-32 has 16 chips), and chips in the others. Sources: the pages of
each version at cloud.google.com/tpu/docs and of TPUs in GKE (October 2026) for machines, labels and topologies.
"""

import math
import re
from typing import NamedTuple

from lm.core.fields import did_you_mean


class Generation(NamedTuple):
    """A version of TPUs. cloud: its name in accelerator types ("" where only GKE has it); label: of GKE nodes;
    dims: of the torus; cores_named: cores a chip that names count; one_host: chips that a single machine may have;
    per_host: chips of a machine of a larger slice; largest: topology of a whole pod; runtime: image of a TPU VM."""

    name: str
    cloud: str
    label: str
    dims: int
    cores_named: int
    one_host: tuple[int, ...]
    per_host: int
    largest: tuple[int, ...]
    runtime: str


GENERATIONS = {generation.name: generation for generation in (
    Generation("v4", "v4", "tpu-v4-podslice", 3, 2, (4,), 4, (16, 16, 16), "tpu-ubuntu2204-base"),
    Generation("v5e", "v5litepod", "tpu-v5-lite-podslice", 2, 1, (1, 4, 8), 4, (16, 16), "v2-alpha-tpuv5-lite"),
    Generation("v5p", "v5p", "tpu-v5p-slice", 3, 2, (4,), 4, (16, 16, 24), "v2-alpha-tpuv5"),
    Generation("v6e", "v6e", "tpu-v6e-slice", 2, 1, (1, 4, 8), 4, (16, 16), "v2-alpha-tpuv6e"),
    Generation("7x", "", "tpu7x", 3, 1, (4,), 4, (16, 24, 24), ""),
)}
ALIASES = {"v5litepod": "v5e", "tpu7x": "7x", "ironwood": "7x", "trillium": "v6e"}
_NAME = re.compile(r"(?P<generation>[a-z0-9]+)(-(?P<count>\d+)|:(?P<topology>\d+(x\d+)*))")


class Slice(NamedTuple):
    """Chips of one generation that are wired together."""

    generation: Generation
    topology: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Chips in all."""
        return math.prod(self.topology)

    @property
    def chips_per_host(self) -> int:
        """Chips of a machine."""
        return self.chips if self.chips in self.generation.one_host else self.generation.per_host

    @property
    def hosts(self) -> int:
        """Machines."""
        return self.chips // self.chips_per_host

    @property
    def shape(self) -> str:
        """The topology as Google writes it."""
        return "x".join(map(str, self.topology))

    @property
    def accelerator_type(self) -> str:
        """The name for TPU VMs. Raises ValueError for a generation that has none."""
        if not self.generation.cloud:
            raise ValueError(f"{self.generation.name} is offered through GKE only; use lm launch gke")
        return f"{self.generation.cloud}-{self.chips * self.generation.cores_named}"


def find_slice(name: str) -> Slice:
    """The slice of that name. Raises ValueError for what does not exist, with what does."""
    match = _NAME.fullmatch(name.lower())
    known = f"generations: {', '.join(GENERATIONS)}; write v5e-256, or a topology, v5p:4x4x8"
    if match is None:
        raise ValueError(f"no TPU slice {name!r}; {known}")
    word = ALIASES.get(match["generation"], match["generation"])
    if word not in GENERATIONS:
        raise ValueError(f"no TPU generation {word!r}{did_you_mean(word, [*GENERATIONS, *ALIASES])}; {known}")
    generation = GENERATIONS[word]
    if match["topology"]:
        topology = tuple(map(int, match["topology"].split("x")))
        _check_topology(generation, topology)
        return Slice(generation, topology)
    count = int(match["count"])
    sizes = {math.prod(shape) * generation.cores_named: shape for shape in topologies(generation)}
    if count not in sizes:
        nearest = sorted(sorted(sizes), key=lambda size: abs(size - count))[:3]
        what = "cores" if generation.cores_named > 1 else "chips"
        raise ValueError(f"no slice {generation.name}-{count} (the number counts {what}); nearest: "
                         f"{', '.join(f'{generation.name}-{size}' for size in sorted(nearest))}; or give a topology")
    return Slice(generation, sizes[count])


def topologies(generation: Generation) -> list[tuple[int, ...]]:
    """The usual topology of each size: doubled along one side after the other up to the whole pod."""
    shape = [1] * generation.dims if generation.dims == 2 else [2, 2, 1]
    out = [tuple(shape)]
    while True:
        # The shortest side grows; of equal ones the last.
        sides = sorted(range(len(shape)), key=lambda i: (shape[i], -i))
        grows = next((i for i in sides if shape[i] * 2 <= sorted(generation.largest)[i]), None)
        if grows is None:
            break
        shape[grows] *= 2
        out.append(tuple(shape))
    # Of two chips there is no machine.
    whole = [s for s in out if math.prod(s) in generation.one_host or math.prod(s) % generation.per_host == 0]
    return whole if tuple(sorted(generation.largest)) in whole else [*whole, generation.largest]


def _check_topology(generation: Generation, topology: tuple[int, ...]) -> None:
    chips = math.prod(topology)
    if len(topology) != generation.dims:
        raise ValueError(f"a topology of {generation.name} has {generation.dims} sides; got "
                         f"{'x'.join(map(str, topology))}")
    fits = all(a <= b for a, b in zip(sorted(topology), sorted(generation.largest), strict=True))
    if not fits or chips < 1 or not (chips in generation.one_host or chips % generation.per_host == 0):
        raise ValueError(f"no slice {generation.name}:{'x'.join(map(str, topology))}: up to "
                         f"{'x'.join(map(str, generation.largest))}, with {' or '.join(map(str, generation.one_host))} "
                         f"chips, or a multiple of {generation.per_host}")
