"""The least time of a call of a Pallas kernel, from the work that its operation wrote down (`pallas_kernels.aot.case`).

XLA does not look inside kernels. Of a call the program shows shapes and, where the kernel gave one, a cost estimate;
matrix, vector and transcendental work is the case's, in proportion to its elements.
"""

import functools
import math
from collections import Counter
from typing import NamedTuple

from launch.planning.chips import Chip
from launch.planning.work import Kernel
from pallas_kernels.aot.bound import REGISTER
from pallas_kernels.aot.case import Case, cases
from pallas_kernels.aot.targets import TARGETS

# Vector and transcendental instructions that a core issues a cycle, as libtpu 0.0.42.1 heads its schedules (`lm kernels
# schedule wkv4 --target v4 --json`). v6e and 7x have no published clock, so no vector rate.
SLOTS = {"v4": (2, 1), "v5e": (4, 1), "v5p": (4, 1)}
# Results of exp2, rcp and the like a cycle and multiprocessor (CUDA C++ Programming Guide, arithmetic instructions).
GPU_TRANSCENDENTAL = 16
# Matrix products over pairs of positions: scores and sums; these again and what the gradients of keys and values take;
# and of queries.
ATTENTION = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}


class KernelBound(NamedTuple):
    """seconds of the part that binds; parts: seconds by name, "bytes", "matrix", "vector", "transcendental"; known: the
    operation's own work was found, else only bytes and what the call says count."""

    seconds: float
    parts: dict[str, float]
    known: bool


def kernel_bound(kernel: Kernel, chip: Chip, causal: bool = True) -> KernelBound:
    """Of one call on one device. causal: attention is to all positions before; else its products are left out, since
    how many keys a window leaves is not in the program."""
    share = 1 / chip.devices
    case, direction = case_of(kernel.name)
    vector, transcendental = rates(chip)
    moved = kernel.cost.get("bytes_accessed") or arrays_bytes(kernel)
    parts = {"bytes": moved / (chip.bandwidth * share)}
    products = attention_flops(kernel)
    if products:
        parts["matrix"] = causal * products / (chip.peak * share)
        return KernelBound(max(parts.values()), parts, causal)
    if case is not None and kernel.name not in case.expected_calls(direction):
        return KernelBound(parts["bytes"], parts, False)    # one of several that share the work
    if case is None:
        parts["matrix"] = kernel.cost.get("flops", 0) / (chip.peak * share)
        return KernelBound(max(parts.values()), parts, False)
    scale = elements(case, kernel) / case.elements
    work = case.work[direction]
    parts["matrix"] = 2 * work.matrix * scale / (chip.peak * share)
    if vector:
        parts["vector"] = work.vector * scale / (vector * share)
        parts["transcendental"] = work.transcendental * scale / (transcendental * share)
    return KernelBound(max(parts.values()), parts, True)


def arrays_bytes(kernel: Kernel) -> int:
    """Bytes of what a call reads and writes; of a table of experts one vector of each row that is chosen."""
    given = list(kernel.operands)
    out = sum(a.bytes for a in kernel.results)
    if kernel.name.startswith("peer_experts") and given:
        table = max(given, key=lambda a: a.bytes if len(a.dims) == 3 else -1)
        chosen = max((a.elements for a in given if a.dtype == "s32"), default=0)
        given.remove(table)
        out += min(table.bytes, chosen * table.bytes // max(1, table.dims[0] * table.dims[1] if len(table.dims) == 3
                                                            else 1))
    return out + sum(a.bytes for a in given)


def attention_flops(kernel: Kernel) -> float:
    """Of a call of jax's splash attention, with half of the pairs of positions; 0.0 of other kernels."""
    products = next((n for name, n in ATTENTION.items() if kernel.name.startswith(name)), 0)
    wide = [a.dims for a in kernel.operands if len(a.dims) >= 3 and a.dtype in ("bf16", "f32", "f16")]
    if not products or len(wide) < 2:
        return 0.0
    queries, keys = wide[:2]
    return products * 2.0 * math.prod(queries) * keys[-2] / 2


def rates(chip: Chip) -> tuple[float, float]:
    """Float32 operations and transcendental results a second of a chip; zeros where they are not known."""
    target = TARGETS[chip.name]
    if target.gpu is not None:
        clock = target.gpu.multiprocessors * target.gpu.clock_mhz * 1e6
        return clock * target.gpu.lanes, clock * GPU_TRANSCENDENTAL
    if chip.name not in SLOTS:
        return 0.0, 0.0
    vector, transcendental = SLOTS[chip.name]
    each = chip.cores * REGISTER * target.clock
    return vector * each, transcendental * each


def case_of(name: str) -> tuple[Case | None, str]:
    """The case and direction whose calls begin like this name; None and "" for a kernel of others."""
    for call, case, direction in _calls():
        if name.startswith(call):
            return case, direction
    return None, ""


@functools.cache
def _calls() -> list[tuple[str, Case, str]]:
    """Longest names first: `wkv4_backward` is none of a kernel called `wkv4`."""
    out = [(call, case, direction) for case in cases() for direction in case.work
           for call in case.expected_calls(direction)]
    # In a backward's calls the forward's kernel may stand too; the name says which it is.
    out = [(call, case, "backward" if call.endswith("backward") else direction) for call, case, direction in out]
    return sorted(out, key=lambda entry: -len(entry[0]))


def elements(case: Case, kernel: Kernel) -> float:
    """What the case counts its elements by, of this call: rows of experts by their width, scores of sub-keys, else the
    numbers in an array of the size that most of the arrays have."""
    if case.name.startswith("peer_experts"):
        ids = max((a.elements for a in kernel.operands if a.dtype == "s32"), default=0)
        return ids * max((a.dims[-1] * math.prod(a.dims[2:-1]) for a in kernel.operands if len(a.dims) >= 3), default=0)
    if case.name.startswith("product_key_topk") and kernel.cost.get("flops"):
        width = next(a.dims[-1] for a in kernel.operands if len(a.dims) > 1)
        return kernel.cost["flops"] / (2 * width)
    sizes = Counter(a.elements for a in (*kernel.operands, *kernel.results) if a.dtype in ("bf16", "f32", "f16"))
    return max(sizes, key=lambda size: (sizes[size], size), default=0)
