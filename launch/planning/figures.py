"""What a plan says: memory, work, times and costs of one compiled program, as plain numbers."""

import gzip
from collections.abc import Mapping
from typing import Any

from launch.planning import hlo
from launch.planning.liveness import kept_for_backward
from launch.planning.machines import Machine
from launch.planning.roofline import roofline, whole
from launch.planning.work import work_of

GIB = 2**30
# What a device holds, in the order in which it is printed.
HELD = {"params": "parameters", "optimizer": "optimizer state", "other": "carried state", "batch": "batch, counters",
        "activations": "activations kept for the backward pass", "temporaries": "gradients and other temporaries",
        "not_in_place": "results beside the state", "generated": "program"}


def memory_of(result: Mapping[str, Any], activations: int) -> dict[str, int]:
    """Bytes of a device by kind; activations are a part of what the compiler calls temporaries."""
    kept = min(activations, result["temporaries"])
    parts = {**result, "activations": kept, "temporaries": result["temporaries"] - kept}
    return {name: parts[name] for name in HELD}


def figures(result: Mapping[str, Any], machine: Machine, *, tokens: int, flops: float, steps: int,
            unknown_trips: float, causal: bool = True) -> dict[str, Any]:
    """All numbers of a plan whose program compiled. tokens: of a step; flops: that the model needs for it by the
    formula of docs/flops.md; steps: of the run; unknown_trips: of loops whose number is drawn as they run; causal:
    attention has no window."""
    with gzip.open(result["program"], "rt") as file:
        module = hlo.parse(file.read())
    on_chip = machine.kind.gpu is None
    work = work_of(module, on_chip=on_chip, devices=machine.devices, unknown_trips=unknown_trips)
    held = memory_of(result, kept_for_backward(module, on_chip=on_chip))
    total = sum(held.values())
    out: dict[str, Any] = dict(memory=held, total=total, fits=total <= machine.gib * GIB, unknown_loops=work.unknown,
                               seconds=result["seconds"], cached=result["cached"], xla=result.get("xla", {}))
    if machine.chip is None:
        return out | dict(flops=sum(i.flops * i.times for i in work.items),
                          bytes=sum(i.bytes * i.times for i in work.items),
                          model_flops=flops, pairs=[(i.times, i.flops, i.bytes) for i in work.items])
    granules = whole(result.get("granules"), machine.devices)
    found = roofline(work, machine.chip, granules, causal)
    return out | dict(
        flops=found.flops, bytes=found.bytes, matrix_seconds=found.matrix, memory_seconds=found.memory,
        busy_seconds=found.busy, link_seconds=found.links,
        kernels=[one._asdict() for one in found.kernels], collectives=[one._asdict() for one in found.collectives],
        overlapped=costs(found.overlapped, machine, tokens=tokens, flops=flops, steps=steps),
        apart=costs(found.apart, machine, tokens=tokens, flops=flops, steps=steps))


def costs(seconds: float, machine: Machine, *, tokens: int, flops: float, steps: int) -> dict[str, float]:
    """Of a run whose steps take so long: MFU = flops / (seconds x peak x chips), tokens a second, days, chip-hours."""
    return dict(seconds=seconds, mfu=flops / (seconds * machine.chip.peak * machine.chips),
                tokens_per_second=tokens / seconds, days=steps * seconds / 86_400,
                chip_hours=machine.chips * steps * seconds / 3_600)
