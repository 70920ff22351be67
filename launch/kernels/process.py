"""Start the compiler of `pallas_kernels.aot.compilation` in a process of its own, under a time limit."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

from pallas_kernels.aot.schedule import dump_flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Settings of another use of jax that must not reach the compiler: a pinned platform is replaced, flags are dropped.
_DROPPED = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_COMPILATION_CACHE_DIR", "JAX_PLATFORM_NAME")
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}   # the last: others on this machine may be compiling


def python_with_libtpu(given: str | None) -> str:
    """The interpreter that compiles. Raises ValueError, with what to install, where none has libtpu."""
    if given:
        return given
    if importlib.util.find_spec("libtpu"):
        return sys.executable
    raise ValueError("libtpu is not installed here: pip install 'loomlm[aot]' (no TPU is needed), or give --python, a "
                     "python that has jax and libtpu")


def environment(dump: str | None = None) -> dict[str, str]:
    """The environment of the compiling process; dump is the folder for its schedules."""
    out = {name: value for name, value in os.environ.items() if name not in _DROPPED} | _ENVIRONMENT
    out["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return out | ({"LIBTPU_INIT_ARGS": dump_flags(dump)} if dump else {})


def compiler_version(python: str) -> str:
    """For example "jax 0.10.2, libtpu 0.0.42.1". Raises ValueError where that python lacks one of them."""
    code = "from importlib.metadata import version as v; print(f'jax {v(\"jax\")}, libtpu {v(\"libtpu\")}')"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, env=environment())
    except OSError as error:
        raise ValueError(f"--python {python!r} cannot be started: {error.strerror}") from None
    if done.returncode:
        raise ValueError(f"{python!r} has no jax with libtpu: {done.stderr.strip().splitlines()[-1]}; "
                         "pip install 'jax[tpu]' into it")
    return done.stdout.strip()


def run(python: str, cell: tuple[str, str, str, str], limit: float, dump: str | None = None) -> dict[str, Any]:
    """What compiling (case, direction, kernel, target) gave; "status" is ok, no kernel, refused, timeout or crashed."""
    case, direction, kernel, target = cell
    command = [python, "-m", "pallas_kernels.aot.compilation", case, direction, target, kernel]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                               env=environment(dump), start_new_session=True)
    try:
        out, error = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return dict(status="timeout", reason=f"not done after {limit:g} s")
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        said = [line.strip() for line in error.splitlines() if line.strip()]
        return dict(status="crashed", reason=f"exit code {process.returncode}: {said[-1] if said else 'no message'}")
    return json.loads(lines[-1])
