"""Ask for a compiled program: from the cache, else from a compiler in a process of its own."""

import json
import logging
import tempfile
from collections.abc import Mapping
from typing import Any

from launch.kernels import process
from launch.planning import cache
from launch.planning.machines import CPU, Machine

log = logging.getLogger(__name__)


def compiler_of(python: str, machine: Machine) -> str:
    """What compiles for the machine there, with versions. Raises ValueError, with what to install, for nothing."""
    if machine.kind is CPU:
        import jax
        return f"jax {jax.__version__}, CPU"
    return process.compiler_for(python, [machine.kind.name])[machine.kind.toolchain]


def compiled(asked: Mapping[str, Any], python: str, compiler: str, limit: float, *,
             refresh: bool = False) -> dict[str, Any]:
    """The result of `launch.planning.compile_step`, with `program`, where the compiled text is, and `cached`."""
    folder = cache.entry(asked, compiler)
    found = None if refresh else cache.load(folder)
    if found is not None:
        return {**found, "program": str(folder / cache.PROGRAM), "cached": True}
    folder.mkdir(parents=True, exist_ok=True)
    log.info("compiling for %s with %s", asked["target"], compiler)
    with tempfile.NamedTemporaryFile("w", suffix=".json", dir=folder) as file:
        json.dump({**asked, "program": str(folder / cache.PROGRAM)}, file)
        file.flush()
        result = process.answer([python, "-m", "launch.planning.compile_step", file.name], process.environment(), limit)
    cache.store(folder, result)
    return {**result, "program": str(folder / cache.PROGRAM), "cached": False}
