"""`lm plan --target`: the train step compiled for a machine that is not here, and whether it fits."""

import json
import pathlib
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from launch.kernels import process
from launch.planning.targets import Machine, find_machine

LIMIT = 1800.0  # seconds for a compiler
PARTS = {"params": "parameters and statistics", "optimizer": "optimizer state", "other": "batch and counters",
         "temporaries": "temporaries", "not_in_place": "results beside the state", "generated": "program"}


def plan(config: Any, vocab_size: int, target: str, python: str | None) -> str:
    """The report. Raises ValueError for a target, mesh, batch or python that cannot be."""
    from launch import config as configs
    from lm.core.axes import BATCH_AXES
    from lm.models.build import build_model, check_mesh
    machine, python = find_machine(target), python or sys.executable
    compiler = process.compiler_for(python, [machine.kind.name])[machine.kind.toolchain]
    mesh = configs.mesh_shape(config, machine.devices)
    check_mesh(build_model(config.model.to_dict(), vocab_size), mesh)
    rows = config.train.microbatches
    for axis in BATCH_AXES:
        rows *= mesh[axis]
    if config.train.batch_size % rows:
        near = max(1, round(config.train.batch_size / rows)) * rows
        raise ValueError(f"config.train.batch_size={config.train.batch_size} must be divisible by data x fsdp x "
                         f"microbatches = {rows} on {target}; nearest: {near}")
    groups = {group: configs.plain(config[group], group) for group in ("model", "loss", "optimizer", "train")}
    asked = dict(target=target, mesh=mesh, vocab_size=vocab_size, **groups)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "step.json"
        file.write_text(json.dumps(asked))
        result = process.answer([python, "-m", "launch.planning.compile_step", str(file)], process.environment(), LIMIT)
    return report(machine, mesh, compiler, result)


def report(machine: Machine, mesh: Mapping[str, int], compiler: str, result: Mapping[str, Any]) -> str:
    """What came out, as text."""
    axes = ", ".join(f"{axis} {n}" for axis, n in mesh.items() if n > 1) or "one device"
    head = f"{machine.chips} x {machine.kind.name} ({axes}), a device of {machine.gib:g} GiB; {compiler}"
    if result["status"] != "ok":
        without = "; --config.model.attention.implementation=blocked needs no such library"
        return f"{head}\n{result['status']}: {result['reason']}{without if 'cuDNN' in result['reason'] else ''}"
    gib = {name: result[name] / 2**30 for name in PARTS}
    total = sum(gib.values())
    verdict = "fits" if total <= machine.gib else "does not fit"
    lines = [f"  {what:<26}{gib[name]:9.3f} GiB" for name, what in PARTS.items()]
    return "\n".join([head, *lines, f"  {'in all':<26}{total:9.3f} GiB: {verdict}, compiled in "
                                    f"{result['seconds']:.0f} s, not run"])
