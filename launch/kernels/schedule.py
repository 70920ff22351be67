"""`lm kernels schedule OP`: cycles of the kernels of an operation on one target, from the compiler's own schedule."""

import argparse
import json
import pathlib
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from launch.kernels import process
from launch.kernels.cells import Cell, plan
from pallas_kernels.aot.bound import bound, traffic_cycles
from pallas_kernels.aot.case import Case, Work, operations, selected
from pallas_kernels.aot.schedule import Schedule, read_schedules
from pallas_kernels.aot.targets import TARGETS, Target, find_target


def run(args: argparse.Namespace) -> int:
    """Compiles, reads and prints; 1 where a kernel did not compile."""
    if not args.ops:
        raise ValueError(f"`lm kernels schedule` needs an operation: {', '.join(operations())}")
    targets = [find_target(name) for name in args.target or ["v5e"]]
    for target in targets:
        if target.gpu is not None:
            raise ValueError(f"schedules are read from libtpu and {target.name} is no TPU; "
                             f"TPUs: {', '.join(t.name for t in TARGETS.values() if t.gpu is None)}")
    known = selected(args.ops)
    python = args.python or sys.executable
    compiler = process.compiler_for(python, [target.name for target in targets])["libtpu"]
    out, failed = [], False
    for case in known:
        for cell in plan([case], [target.name for target in targets], args.direction):
            one = measure(python, case, cell, args.limit) | {"compiler": compiler}
            failed = failed or one["status"] != "ok"
            out.append(one)
            if not args.json:
                print(text(one), flush=True)
    if args.json:
        print(json.dumps(out, indent=2))
    return 1 if failed else 0


def measure(python: str, case: Case, cell: Cell, limit: float) -> dict[str, Any]:
    """The result of compiling, and of each kernel that the direction asks for its schedule; with the sums against the
    bound where the target's clock is known."""
    with tempfile.TemporaryDirectory() as folder:
        result = process.run(python, cell, limit, dump=folder)
        result["cell"] = cell.key
        if result["status"] != "ok":
            return result
        wanted = [call for call in dict.fromkeys(result["calls"])
                  if call.startswith(case.expected_calls(cell.direction))]
        schedules = read_schedules(pathlib.Path(folder), wanted, case.trips)
    return result | summary(case, cell.direction, TARGETS[cell.target], result, schedules)


def summary(case: Case, direction: str, target: Target, result: Mapping[str, Any],
            schedules: list[Schedule]) -> dict[str, Any]:
    """Cycles, and the estimate against the bound.

    The estimate is the larger of the kernels' cycles and of the time that the bytes take that the program says it
    accesses; a backward's program that calls the forward kernel has the forward's bytes as well, which are taken off.
    Where a device has two cores, the schedule is that of one, with its half of the grid.
    """
    out: dict[str, Any] = dict(elements=case.elements, cycles=sum(s.cycles for s in schedules),
                               complete=all(s.complete for s in schedules),
                               spills=sum(body.spills for s in schedules for body in s.bodies),
                               kernels=[_plain(s) for s in schedules])
    out["cycles_per_1024"] = out["cycles"] / (case.elements / 1024)
    work = case.work[direction]
    extra = 0
    if direction == "backward" and any(call.startswith(case.expected_calls("forward")) for call in result["calls"]):
        extra = case.work.get("forward", Work(0)).bytes
    out["bytes_ratio"] = (result["bytes"] - extra) / work.bytes
    if target.clock_known:
        least = bound(work, target, schedules[0].slots)
        traffic = traffic_cycles(result["bytes"] - extra, target)
        estimate = max(out["cycles"], traffic)
        out |= dict(bound=least._asdict(), traffic_cycles=traffic, estimate_cycles=estimate,
                    ratio=estimate / least.cycles, compute_to_bytes=out["cycles"] / least.parts["bytes"])
    return out


def _plain(schedule: Schedule) -> dict[str, Any]:
    return dict(kernel=schedule.kernel, cycles=schedule.cycles, complete=schedule.complete, slots=schedule.slots,
                bodies=[body._asdict() for body in schedule.bodies])


def text(one: Mapping[str, Any]) -> str:
    """What is printed of one cell."""
    if one["status"] != "ok":
        return f"{one['cell']}: {one['status']}: {one['reason']}\n"
    lines = [f"{one['cell']} ({one['compiler']}), {one['elements']:,} elements"]
    for kernel in one["kernels"]:
        units = list(kernel["bodies"][0]["shares"])
        known = "" if kernel["complete"] else " (at least: a loop has no constant number of trips)"
        lines += [f"  {kernel['kernel']}: {kernel['cycles']:,} cycles{known}",
                  "  " + f"{'at':>8} {'depth':>5} {'bundles':>7} {'trips':>6} {'runs':>9} "
                  + " ".join(f"{unit:>6}" for unit in units) + "  spills"]
        for body in kernel["bodies"]:
            shares = " ".join(f"{100 * body['shares'][unit]:>5.0f}%" for unit in units)
            lines.append("  " + f"{body['at']:>8} {body['depth']:>5} {body['bundles']:>7} {body['trips'] or '?':>6} "
                         f"{body['runs'] or '?':>9} {shares}  {body['spills']}")
    lines.append(f"  {one['cycles_per_1024']:.2f} cycles per 1,024 elements, {one['spills']} spills; the program "
                 f"accesses {one['bytes_ratio']:.2f} of the minimal bytes, temporaries {one['temporaries']:,} bytes")
    if "bound" in one:
        parts = ", ".join(f"{name} {cycles:,.0f}" for name, cycles in one["bound"]["parts"].items())
        lines.append(f"  bound {one['bound']['cycles']:,.0f} cycles by {one['bound']['binding']} ({parts}); estimate "
                     f"{one['estimate_cycles']:,.0f} = {one['ratio']:.2f} times the bound; compute is "
                     f"{one['compute_to_bytes']:.2f} of the time of the minimal bytes")
    else:
        lines.append("  no bound: the clock of this target is not published")
    return "\n".join(lines) + "\n"
