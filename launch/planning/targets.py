"""Machines that are not here, as `lm plan --target` names them: "v5e-256", "h100-8"."""

import math
from typing import NamedTuple

from pallas_kernels.aot.targets import Target, find_target

# GiB of memory of a chip, as published: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x (October 2026).
CHIP_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "7x": 192}
DEVICES_A_CHIP = {"v4": 2, "7x": 2}
# Slices by their number of chips, as libtpu names them.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
SLICES = {"v5e": FLAT, "v6e": FLAT, "v4": CUBES, "v5p": CUBES, "7x": CUBES}
GPUS_A_HOST = 8


class Machine(NamedTuple):
    """kind: of its devices. chips: how many there are. devices: JAX devices. gib: memory of a device. topology: its
    name for the compiler."""

    kind: Target
    chips: int
    devices: int
    gib: float
    topology: str


def find_machine(name: str) -> Machine:
    """The machine "KIND-CHIPS". Raises ValueError with what there is, and the nearest size."""
    kind, dash, count = name.rpartition("-")
    if not dash or not count.isdigit() or int(count) < 1:
        raise ValueError(f"--target {name!r} must be KIND-CHIPS, such as v5e-256 or h100-8")
    target, chips = find_target(kind), int(count)
    if target.gpu is not None:
        if chips > GPUS_A_HOST and chips % GPUS_A_HOST:
            near = max(1, round(chips / GPUS_A_HOST)) * GPUS_A_HOST
            raise ValueError(f"--target {name!r}: {chips} GPUs are no whole hosts of {GPUS_A_HOST}; nearest: "
                             f"{kind}-{near}")
        hosts = math.ceil(chips / GPUS_A_HOST)
        shape = f"1x1x{chips}" if hosts == 1 else f"1x{hosts}x{GPUS_A_HOST}"
        return Machine(target, chips, chips, target.gpu.memory_gib, shape)
    slices = SLICES[target.name]
    if chips not in slices:
        near = min(slices, key=lambda n: (abs(n - chips), n))
        raise ValueError(f"--target {name!r}: {target.name} has slices of {', '.join(map(str, slices))} chips; "
                         f"nearest: {target.name}-{near}")
    each = DEVICES_A_CHIP.get(target.name, 1)
    # "v5e:2x2" of the table of kernels gives the name that libtpu has for the kind.
    topology = f"{target.topology.partition(':')[0]}:{slices[chips]}"
    return Machine(target, chips, chips * each, CHIP_GIB[target.name] / each, topology)
