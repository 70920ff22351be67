"""When a plan does not fit: one change after another, each compiled, until one does."""

import math
from collections.abc import Callable
from typing import Any

from launch.planning.figures import GIB
from launch.planning.machines import Machine
from launch.planning.planned import Plan, Setting, make_plan, needs
from lm.core.axes import BATCH_AXES

ROOM = 0.9     # of a device's memory is aimed at: what is computed of parts does not add up exactly
STATE = 0.5    # of it may be parameters and optimizer state before these are split further
Flags = dict[str, Any]


def propose(plan: Plan, setting: Setting, resolve: Callable[[Flags], Any], tries: int,
            tell: Callable[[str], None]) -> Plan | None:
    """The first plan that fits, None where the changes or the tries ran out. resolve: the config with flags added."""
    flags: Flags = {}
    for _ in range(tries):
        change = next_change(plan, setting.machine, decode=setting.decode is not None)
        if change is None:
            return None
        flags |= change
        tell(f"trying {format_flags(flags)}")
        try:
            plan = make_plan(resolve(flags), setting, format_flags(flags).split())
        except ValueError as error:
            tell(f"  {error}")
            return None
        need = needs(plan)
        tell(f"  {'fits' if plan.fits else 'does not fit'}" + (f": {need:.2f} GiB" if need else
                                                              f": {plan.result.get('reason', '')}"))
        if plan.fits:
            return plan
    return None


def next_change(plan: Plan, machine: Machine, decode: bool = False) -> Flags | None:
    """What to change next, by what the memory goes to: state that is held whole on every device is split over `fsdp`,
    then the backward pass recomputes more, then the batch is run in more pieces, then `tensor` splits widths; of a
    decode step the mesh alone. None where nothing is left, or nothing is known of the memory."""
    need = needs(plan)
    if need is None:
        return None
    mesh, config, room = plan.mesh, plan.config, ROOM * machine.gib
    state = (plan.result["params"] + plan.result["optimizer"]) / GIB
    rows = math.prod(mesh[axis] for axis in BATCH_AXES)
    split = _split(mesh, machine, config.model.embed_dim)
    if split and (state > STATE * machine.gib or any(one.axis == "fsdp" for one in plan.undivided)):
        return split
    if not decode and config.model.get("remat", "none") != "full":
        return {"model.remat": "full"}
    pieces, batch = config.train.microbatches, config.train.batch_size
    times = 2 ** max(1, math.ceil(math.log2(max(1.0, (need - state) / max(room - state, 1e-9)))))
    while times > 1 and batch % (rows * pieces * times):
        times //= 2
    if times > 1 and room > state and not decode:
        return {"train.microbatches": pieces * times}
    if split:
        return split
    if mesh["fsdp"] % 2 == 0 and mesh["fsdp"] > 1:
        return {"mesh.data": _within(mesh, machine), "mesh.fsdp": mesh["fsdp"] // 2,
                "mesh.tensor": 2 * mesh["tensor"]}
    return None


def _within(mesh: Any, machine: Machine) -> int:
    """Devices of a slice along `data`."""
    return mesh["data"] // (machine.slices if machine.kind.gpu is None else 1)


def _split(mesh: Any, machine: Machine, width: int) -> Flags | None:
    """As much of `data` and `fsdp` within a slice to `fsdp` as divides the width; None where that is so already."""
    devices = _within(mesh, machine) * mesh["fsdp"]
    fsdp = math.gcd(devices, width)
    return None if fsdp == mesh["fsdp"] else {"mesh.data": devices // fsdp, "mesh.fsdp": fsdp}


def format_flags(flags: Flags) -> str:
    """As they are typed."""
    return " ".join(f"--config.{path}={value}" for path, value in flags.items())
