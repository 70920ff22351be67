"""`lm plan --search`: meshes and remat policies, compiled and ranked by their estimated step."""

import itertools
import math
from collections.abc import Callable
from typing import Any

from launch.planning.figures import GIB
from launch.planning.machines import Machine
from launch.planning.planned import Plan, Setting, make_plan, needs
from launch.planning.propose import Flags, format_flags
from launch.planning.report import milli

REMAT = ("none", "minimal", "full")     # the fastest first
COPIES = 4  # of the parameters' bytes: with their gradient and two moments


def search(config: Any, setting: Setting, resolve: Callable[[Flags], Any], trials: int,
           tell: Callable[[str], None]) -> list[Plan]:
    """The plans of at most `trials` settings, best first: those that fit by their step, then the others by what they
    need. Of each mesh the remat policies from the fastest on, until one fits. Meshes with which the state alone is
    larger than a device are not compiled."""
    out, done = [], []
    for mesh, remat in itertools.product(meshes(config, setting.machine), REMAT):
        if len(out) == trials:
            break
        if mesh in done:
            continue
        flags = {"model.remat": remat, **mesh}
        try:
            changed = resolve(flags)
            if state_gib(changed, setting) > setting.machine.gib:
                tell(f"{format_flags(mesh)}: parameters and moments alone are larger than a device")
                done.append(mesh)
                continue
            plan = make_plan(changed, setting, format_flags(flags).split())
        except ValueError as error:
            tell(f"{format_flags(flags)}: {error}")
            done.append(mesh)
            continue
        out.append(plan)
        tell(f"{format_flags(flags)}: {line(plan)}")
        if plan.fits:
            done.append(mesh)
    return sorted(out, key=lambda plan: (not plan.fits, plan.seconds if plan.fits else needs(plan) or math.inf))


def meshes(config: Any, machine: Machine) -> list[Flags]:
    """Devices on data, on fsdp as far as it divides the width, on both, with some on tensor; those of expert and
    context as they are."""
    from launch.planning.ask import full_mesh
    mesh = full_mesh(config, machine)
    slices = machine.slices if machine.kind.gpu is None else 1
    held = mesh["expert"] * mesh["context"]
    free = machine.devices // slices // held
    splits = [(math.gcd(free, config.model.embed_dim), 1), (1, 1), *((n, 1) for n in (8, 16))]
    splits += [(math.gcd(free // n, config.model.embed_dim), n) for n in (2, 4, 8) if n <= free]
    shapes = [{"mesh.data": free // fsdp // tensor, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
              for fsdp, tensor in splits if free % (fsdp * tensor) == 0]
    return [shape for place, shape in enumerate(shapes) if shape not in shapes[:place]]


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
