"""Machines that are not here, as `lm plan --target` names them: "v5e-256", "v5p:4x4x8", "2xv6e-256", "8xH100", "A100".

TPU slices have Google's names (`launch.tpu_slices`): those of v4 and v5p count cores. A number and x in front are
slices, or GPUs. "cpu" is one device of the machine that plans.
"""

import math
import os
import re
from typing import Any, NamedTuple

from launch.planning.chips import CHIPS, Chip
from launch.tpu_slices import ALIASES, GENERATIONS, find_slice
from lm.core.fields import did_you_mean
from pallas_kernels.aot.targets import TARGETS, Target

GPUS_A_HOST = 8
CPU = Target("cpu", ())
_GPUS = tuple(target.name for target in TARGETS.values() if target.gpu is not None)
_WORDS = (*GENERATIONS, *ALIASES)
_GPU = re.compile(rf"(?:(\d+)x)?({'|'.join(_GPUS)})(?:-(\d+))?")
_SLICES = re.compile(r"(\d+)x((?:v\d|7x|tpu|trillium|ironwood).*)")
FORMS = "write a TPU slice by Google's name or topology, v5e-256 or v5p:4x4x8, several slices as 2xv5e-256, GPUs as " \
    "8xH100, or cpu"


class Machine(NamedTuple):
    """kind: of its devices, as the kernels know them. chip: what one can do, None for the CPU. slices: wired together
    by ICI, or hosts of GPUs by NVLink. chips, devices: in all; devices are JAX's. topology: of a slice, for the
    compiler."""

    name: str
    kind: Target
    chip: Chip | None
    slices: int
    chips: int
    devices: int
    topology: str

    @property
    def cores(self) -> int:
        """Cores of all chips."""
        return self.chips * (1 if self.chip is None else self.chip.cores)

    @property
    def gib(self) -> float:
        """Memory of a device."""
        if self.chip is None:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        return self.chip.gib / self.chip.devices

    def topology_options(self) -> dict[str, Any]:
        """What the TPU compiler has to know besides the topology."""
        out: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.kind.name == "v4":  # the two cores of a chip are one device, as when it runs
            out["chip_config_name"] = "megacore"
        if self.kind.gpu is None and self.chips == self.slices:
            out["chips_per_host_bounds"] = (1, 1, 1)
        return out

    def describe(self) -> str:
        """One line: chips, cores and devices."""
        if self.chip is None:
            return "this machine's CPU, one device"
        slices = "" if self.slices == 1 else \
            f" in {self.slices} {'slices' if self.kind.gpu is None else 'hosts'}"
        shape = f" ({self.topology.partition(':')[2]})" if self.kind.gpu is None else ""
        return (f"{self.name}: {self.chips} x {self.chip.name}{shape}{slices}, {self.cores} cores, {self.devices} "
                f"devices of {self.gib:g} GiB")


def find_machine(name: str) -> Machine:
    """The machine of that name. Raises ValueError with what there is, and the nearest."""
    given = name.strip().lower()
    if given == CPU.name:
        return Machine(CPU.name, CPU, None, 1, 1, 1, "")
    if match := _GPU.fullmatch(given):
        return _gpus(name, match)
    match = _SLICES.fullmatch(given)
    slices, rest = (int(match[1]), match[2]) if match else (1, given)
    if slices < 1:
        raise ValueError(f"--target {name!r} has no slices; {FORMS}")
    word = re.split(r"[-:]", rest)[0]
    if word in GENERATIONS and rest == word:
        raise ValueError(f"--target {name!r} does not say how many; {FORMS}")
    known = [*GENERATIONS, *_GPUS, CPU.name]
    if not re.search(r"[-:]", rest) or word not in _WORDS:
        raise ValueError(f"no --target {name!r}{did_you_mean(re.sub('^[0-9]+x', '', word), known)}; kinds: "
                         f"{', '.join(known)}; {FORMS}")
    found = find_slice(rest)
    target, chip = TARGETS[found.generation.name], CHIPS[found.generation.name]
    chips = slices * found.chips
    # "v5e:2x2" of the table of kernels gives the name that libtpu has for the kind.
    topology = f"{target.topology.partition(':')[0]}:{found.shape}"
    return Machine(given, target, chip, slices, chips, chips * chip.devices, topology)


def _gpus(name: str, match: re.Match) -> Machine:
    """Hosts of eight, or a part of one."""
    before, kind, after = match.groups()
    if before and after:
        raise ValueError(f"--target {name!r} says twice how many; write 8x{kind.upper()}")
    count = int(before or after or 1)
    if count < 1 or (count > GPUS_A_HOST and count % GPUS_A_HOST):
        near = max(1, round(count / GPUS_A_HOST)) * GPUS_A_HOST
        raise ValueError(f"--target {name!r}: {count} GPUs are no whole hosts of {GPUS_A_HOST}; nearest: "
                         f"{near}x{kind.upper()}")
    hosts = math.ceil(count / GPUS_A_HOST)
    shape = f"1x1x{count}" if hosts == 1 else f"1x{hosts}x{GPUS_A_HOST}"
    return Machine(f"{count}x{kind.upper()}", TARGETS[kind], CHIPS[kind], hosts, count, count, shape)
