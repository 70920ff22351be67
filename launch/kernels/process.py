"""Start the compiler of `pallas_kernels.aot.compilation` in a process of its own, under a time limit."""

import json
import os
import pathlib
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from pallas_kernels.aot.schedule import dump_flags
from pallas_kernels.aot.targets import TARGETS

# Linux kills the process when its parent ends, by whatever (PR_SET_PDEATHSIG): compilers can run for long. The process
# asks for it itself, since code between fork and exec is not safe in a parent with threads.
_END_WITH_PARENT = """
import ctypes, runpy, signal, sys
if sys.platform.startswith("linux"):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
sys.argv[:3] = [sys.argv[2]]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
ROOT = pathlib.Path(__file__).resolve().parents[2]
# Settings of another use of jax that must not reach the compiler: a pinned platform is replaced, flags are dropped.
_DROPPED = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_COMPILATION_CACHE_DIR", "JAX_PLATFORM_NAME")
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}   # the last: others on this machine may be compiling
# What each toolchain is made of besides jax, and what brings it.
_PACKAGES = {"libtpu": ("libtpu",), "cuda": ("jax-cuda13-plugin", "nvidia-cuda-nvcc")}
INSTALL = {"libtpu": "pip install 'loomlm[aot]' (no TPU is needed)",
           "cuda": "pip install 'loomlm[aot-gpu]' (0.7 GB; no GPU is needed)"}


def environment(dump: str | None = None, toolchain: str = "libtpu") -> dict[str, str]:
    """The environment of the compiling process; dump is the folder for its schedules, or for PTX."""
    out = {name: value for name, value in os.environ.items() if name not in _DROPPED} | _ENVIRONMENT
    out["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if not dump:
        return out
    if toolchain == "libtpu":
        return out | {"LIBTPU_INIT_ARGS": dump_flags(dump)}
    return out | {"XLA_FLAGS": f"--xla_dump_to={dump}", "MOSAIC_GPU_DUMP_TO": dump}


def compilers(python: str) -> dict[str, str]:
    """{"libtpu": "jax 0.10.2, libtpu 0.0.42.1", "cuda": "jax 0.10.2, jax-cuda13-plugin 0.10.2, ..."}: what it has.

    Raises ValueError where it has none, or cannot be started.
    """
    names = ["jax", *(name for packages in _PACKAGES.values() for name in packages)]
    code = ("import importlib.metadata as m, json\nout = {}\n"
            f"for name in {names}:\n"
            "    try: out[name] = m.version(name)\n"
            "    except m.PackageNotFoundError: pass\n"
            "print(json.dumps(out))")
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, env=environment())
    except OSError as error:
        raise ValueError(f"--python {python!r} cannot be started: {error.strerror}") from None
    if done.returncode:
        raise ValueError(f"{python!r} cannot say what it has: {done.stderr.strip().splitlines()[-1]}")
    versions = json.loads(done.stdout)
    out = {toolchain: ", ".join(f"{name} {versions[name]}" for name in ("jax", *packages))
           for toolchain, packages in _PACKAGES.items() if versions.keys() >= {"jax", *packages}}
    if not out:
        raise ValueError(f"{python!r} has no compiler for kernels: {', or '.join(INSTALL.values())}; or give --python, "
                         "a python that has jax and one of them")
    return out


def compiler_for(python: str, targets: Sequence[str]) -> dict[str, str]:
    """`compilers(python)`. Raises ValueError, with what to install, where one of the targets' compilers is missing."""
    found = compilers(python)
    for name in targets:
        toolchain = TARGETS[name].toolchain
        if toolchain not in found:
            raise ValueError(f"{python!r} cannot compile for {name}: it needs {' and '.join(_PACKAGES[toolchain])}: "
                             f"{INSTALL[toolchain]}, or give --python, a python that has them")
    return found


def toolchain_of(compiler: str) -> str:
    """Which toolchain a compiler of the record is, by the packages in its name."""
    return next(toolchain for toolchain, packages in _PACKAGES.items() if f", {packages[0]} " in compiler)


def run(python: str, cell: tuple[str, str, str, str], limit: float, dump: str | None = None) -> dict[str, Any]:
    """What compiling (case, direction, kernel, target) gave; "status" is ok, no kernel, refused, timeout or crashed."""
    case, direction, kernel, target = cell
    command = [python, "-m", "pallas_kernels.aot.compilation", case, direction, target, kernel]
    if TARGETS[target].toolchain == "libtpu":
        return answer(command, environment(dump), limit)
    with tempfile.TemporaryDirectory() as folder:
        return answer([*command, folder], environment(folder, "cuda"), limit)


def answer(command: list[str], environ: dict[str, str], limit: float) -> dict[str, Any]:
    """The last line of JSON that a command, [PYTHON, -m, MODULE, ...], prints; "status" is timeout or crashed where
    there is none."""
    process = subprocess.Popen([command[0], "-c", _END_WITH_PARENT, *command[1:]], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environ, start_new_session=True)
    try:
        out, error = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return dict(status="timeout", reason=f"not done after {limit:g} s")
    finally:
        if process.poll() is None:  # out of time, or we were interrupted
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        said = [line.strip() for line in error.splitlines() if line.strip()]
        return dict(status="crashed", reason=f"exit code {process.returncode}: {said[-1] if said else 'no message'}")
    return json.loads(lines[-1])
