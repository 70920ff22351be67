"""The devices that kernels are compiled for, and what each can do at most, as published.

One number a JAX device, which is half a chip on TPU v4 and 7x, and a whole one (two cores) on v5p. Sources:
cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x (October 2026) for bytes, FLOP/s and matrix units; Jouppi et al.,
"TPU v4" (ISCA 2023, arXiv:2304.01433), table 4, for its clock of 1,050 MHz. Google publishes no other clock: those of
v5e and v5p follow from peak = units x 128 x 128 x 2 x clock, which gives 1,049 MHz where it can be checked, on v4. For
v6e the same sum gives 3.5 GHz and for 7x the units are not published: these have no clock here, and their cycles are
printed alone. How many elements a vector unit takes a cycle is in the schedule that the compiler writes. Nothing is
timed for GPUs: `gpus.py` has what XLA has to know of them.
"""

import difflib
from typing import NamedTuple

from pallas_kernels.aot.gpus import A100, B200, H100, Gpu


class Target(NamedTuple):
    """A device kind. kernels: names of the implementations that are made for it, best first."""
    name: str
    kernels: tuple[str, ...]
    topology: str = ""                    # of TPUs, as libtpu names the smallest
    bytes_per_second: float = 0.0
    peak_flops: float = 0.0               # bf16 matrix products
    matrix_units: int = 0
    matrix_side: int = 128
    cores: int = 1
    gpu: Gpu | None = None

    @property
    def toolchain(self) -> str:
        """What compiles for it: "libtpu" or "cuda"."""
        return "libtpu" if self.gpu is None else "cuda"

    @property
    def clock_known(self) -> bool:
        """Whether cycles can be turned into seconds."""
        return self.matrix_units > 0 and self.matrix_side == 128

    @property
    def clock(self) -> float:
        """Cycles a second."""
        if not self.clock_known:
            raise ValueError(f"the clock of {self.name} is not published; it has cycles only")
        return self.peak_flops / (self.matrix_units * self.matrix_side ** 2 * 2)


_TPU = ("pallas_tpu",)
_SPARSE = ("pallas_tpu", "pallas_tpu_sparsecore")
TARGETS = {target.name: target for target in (
    Target("v4", _TPU, "v4:2x2x1", 1228e9 / 2, 275e12 / 2, matrix_units=4),
    Target("v5e", _TPU, "v5e:2x2", 819e9, 197e12, matrix_units=4),
    Target("v5p", _SPARSE, "v5p:2x2x1", 2765e9, 459e12, matrix_units=8, cores=2),
    Target("v6e", _SPARSE, "v6e:2x2", 1638e9, 918e12, matrix_units=2, matrix_side=256),
    Target("7x", _SPARSE, "tpu7x:2x2x1", 7380e9 / 2, 2307e12 / 2),
    Target("h100", ("pallas_mosaic_gpu", "pallas_triton"), gpu=H100),
    Target("b200", ("pallas_mosaic_gpu", "pallas_triton"), gpu=B200),
    Target("a100", ("pallas_triton",), gpu=A100),
)}

KERNELS = frozenset(kernel for target in TARGETS.values() for kernel in target.kernels)


def find_target(name: str) -> Target:
    """The target of that name. Raises ValueError with the nearest for an unknown one."""
    if name not in TARGETS:
        near = difflib.get_close_matches(name.lower(), TARGETS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no target {name!r}{hint}; targets: {', '.join(TARGETS)}")
    return TARGETS[name]
