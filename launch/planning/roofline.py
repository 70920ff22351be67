"""The least time of a step on a chip: by its matrix unit, its memory, its kernels and its links.

An instruction takes the longer of its matrix products at peak and its bytes at the memory's bandwidth, instructions
follow one another, and a kernel takes its bound (`launch.planning.kernel_bound`). Vector work outside of kernels,
latencies, and products that do not fill the matrix unit cost nothing here: a step cannot be faster, and will be slower.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from launch.planning.chips import FLOAT32_PASSES, Chip
from launch.planning.kernel_bound import kernel_bound
from launch.planning.matrix import Product
from launch.planning.work import Work

NETWORK = {"ICI": "DCN", "NVLink": "network"}


class Sent(NamedTuple):
    """Collectives of one kind, among so many devices, over one link. bytes: of arrays; sent: by a device; seconds: of
    the link. beside: how many of them run beside other work."""

    kind: str
    size: int
    link: str
    count: float
    bytes: float
    sent: float
    seconds: float
    beside: float


class Called(NamedTuple):
    """Calls of one kernel. binding: what its bound is by; known: from the operation's own work."""

    name: str
    count: float
    seconds: float
    binding: str
    known: bool


class Roofline(NamedTuple):
    """Of one step and device. flops: of matrix products; bytes: to and from memory, kernels' included. Seconds: of the
    matrix products and of the bytes alone; of kernels; `busy` of all instructions one after another, each at its own
    bound, without collectives; `links` of each link."""

    flops: float
    bytes: float
    matrix: float
    memory: float
    kernels: list[Called]
    busy: float
    collectives: list[Sent]

    @property
    def links(self) -> dict[str, float]:
        """Seconds of each link."""
        out: dict[str, float] = {}
        for sent in self.collectives:
            out[sent.link] = out.get(sent.link, 0.0) + sent.seconds
        return out

    @property
    def overlapped(self) -> float:
        """Seconds of a step whose collectives are all hidden behind other work, or hide it."""
        return max([self.busy, *self.links.values()])

    @property
    def apart(self) -> float:
        """Seconds of a step that computes nothing while it sends."""
        return self.busy + sum(self.links.values())


def roofline(work: Work, chip: Chip, granules: Sequence[int], causal: bool = True) -> Roofline:
    """granules: the slice or host of each device, in the order of the mesh. causal: see `kernel_bound`."""
    share = 1 / chip.devices
    bandwidth = chip.bandwidth * share
    flops = moved = matrix = busy = 0.0
    sent: dict[tuple, list[float]] = {}
    called: dict[str, list] = {}
    for item in work.items:
        if item.kernel is not None:
            bound = kernel_bound(item.kernel, chip, causal)
            one = called.setdefault(item.kernel.name, [0.0, 0.0, max(bound.parts, key=bound.parts.get), bound.known])
            one[0] += item.times
            one[1] += item.times * bound.seconds
            busy += item.times * bound.seconds
            moved += item.times * bound.parts["bytes"] * bandwidth
            continue
        products = sum(product_seconds(product, chip) for product in item.products)
        flops += item.times * item.flops
        matrix += item.times * products
        moved += item.times * item.bytes
        busy += item.times * max(products, item.bytes / bandwidth)
        for one in item.collectives:
            crosses = one.between or any(len({granules[n] for n in row}) > 1 for row in one.groups.tolist())
            link = NETWORK[chip.link_name] if crosses else chip.link_name
            total = sent.setdefault((one.kind, one.groups.shape[1], link), [0.0] * 5)
            for n, value in enumerate((1.0, one.bytes, one.sent, one.seconds(chip, granules), float(one.shared))):
                total[n] += item.times * value
    kernels = [Called(name, *values) for name, values in called.items()]
    return Roofline(flops, moved, matrix, moved / bandwidth, kernels, busy,
                    sorted((Sent(*key, *values) for key, values in sent.items()), key=lambda s: -s.seconds))


def product_seconds(product: Product, chip: Chip) -> float:
    """At the peak of its dtype: float32 in as many products of bfloat16 as it is made of, or as TF32; eight bits as
    fast as bfloat16, which is less than some chips can."""
    passes = product.passes * (FLOAT32_PASSES[chip.link_name] if product.dtype == "f32" else 1.0)
    return product.flops * passes / (chip.peak / chip.devices)


def whole(granules: Sequence[int] | None, devices: int) -> Sequence[int]:
    """The granules, one for all where none were noted."""
    return granules if granules else np.zeros(devices, int).tolist()
