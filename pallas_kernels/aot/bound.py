"""The fewest cycles that the work of a direction takes on a target, by published peaks, and which of them binds."""

from typing import NamedTuple

from pallas_kernels.aot.case import Work
from pallas_kernels.aot.targets import Target

REGISTER = 8 * 128       # elements of float32 that one vector instruction works on


class Bound(NamedTuple):
    """cycles of the largest part; parts by name: "bytes", "matrix", "vector", "transcendental"."""
    cycles: float
    binding: str
    parts: dict[str, float]


def bound(work: Work, target: Target, slots: dict[str, int]) -> Bound:
    """slots: issue slots of the units, as the schedule's head gives them. Raises ValueError where no clock is known."""
    parts = {
        "bytes": traffic_cycles(work.bytes, target),
        "matrix": work.matrix / (target.matrix_units * target.matrix_side ** 2),
        "vector": work.vector / (slots["VALU"] * REGISTER * target.cores),
        "transcendental": work.transcendental / (slots["EUP"] * REGISTER * target.cores),
    }
    binding = max(parts, key=parts.get)
    return Bound(parts[binding], binding, parts)


def traffic_cycles(num_bytes: float, target: Target) -> float:
    """Cycles that bytes take between memory and the device. Raises ValueError where no clock is known."""
    return num_bytes / target.bytes_per_second * target.clock
