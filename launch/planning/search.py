"""`lm plan --search`: meshes and remat policies, compiled and ranked by their estimated step."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from launch.planning.figures import GIB
from launch.planning.machines import Machine
from launch.planning.planned import Plan, Setting, make_plan, needs
from launch.planning.propose import Flags, format_flags
from launch.planning.report import milli

COPIES = 4  # of the parameters' bytes: with their gradient and two moments


def search(config: Any, setting: Setting, resolve: Callable[[Flags], Any], trials: int,
           tell: Callable[[str], None]) -> list[Plan]:
    """The plans of at most `trials` settings, best first: those that fit by their step, then the others by what they
    need. Settings whose state alone is larger than a device are not compiled."""
    out = []
    for flags in settings(config, setting.machine):
        if len(out) == trials:
            break
        try:
            changed = resolve(flags)
            if state_gib(changed, setting) > setting.machine.gib:
                tell(f"{format_flags(flags)}: parameters and moments alone are larger than a device")
                continue
            plan = make_plan(changed, setting, format_flags(flags).split())
        except ValueError as error:
            tell(f"{format_flags(flags)}: {error}")
            continue
        out.append(plan)
        tell(f"{format_flags(flags)}: {line(plan)}")
    return sorted(out, key=lambda plan: (not plan.fits, plan.seconds if plan.fits else needs(plan) or math.inf))


def settings(config: Any, machine: Machine) -> Iterator[Flags]:
    """Meshes (devices on data, on fsdp, on both, with some on tensor; those of expert and context as they are), each
    with the remat policies, the cheapest to run first."""
    from launch.planning.ask import full_mesh
    mesh = full_mesh(config, machine)
    slices = machine.slices if machine.kind.gpu is None else 1
    held = mesh["expert"] * mesh["context"]
    free = machine.devices // slices // held
    shapes = [dict(data=1, fsdp=free, tensor=1), dict(data=free, fsdp=1, tensor=1)]
    shapes += [dict(data=free // n, fsdp=n, tensor=1) for n in (8, 16) if free % n == 0 and n < free]
    shapes += [dict(data=1, fsdp=free // n, tensor=n) for n in (2, 4, 8) if free % n == 0 and n <= free]
    for remat in ("none", "minimal", "full"):
        for shape in shapes:
            yield {"model.remat": remat, **{f"mesh.{axis}": n for axis, n in shape.items()}}


def state_gib(config: Any, setting: Setting) -> float:
    """GiB of a device for parameters, gradients and two moments; of parameters alone for decoding."""
    from launch.planning.ask import full_mesh
    from lm.models.build import build_model
    from lm.models.plan import parameter_bytes
    model = build_model(config.model.to_dict(), setting.tokenizer.vocab_size)
    copies = 1 if setting.decode or config.train.lora_rank else COPIES
    return copies * parameter_bytes(model, full_mesh(config, setting.machine)) / GIB


def line(plan: Plan) -> str:
    """One setting in a line."""
    need = needs(plan)
    if plan.numbers is None or "overlapped" not in plan.numbers:
        return f"does not fit: {need:.2f} GiB" if need else f"{plan.result['status']}: {plan.result['reason'][:120]}"
    hidden, apart = plan.numbers["overlapped"], plan.numbers["apart"]
    return (f"{'fits' if plan.fits else 'does not fit'}, {need:.2f} GiB, step at least {milli(hidden['seconds'])} to "
            f"{milli(apart['seconds'])}, MFU at most {hidden['mfu']:.1%}")
