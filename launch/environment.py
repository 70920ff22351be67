"""Where and with what a run was made: git revision, versions, devices, flags. Written to the workdir at each start."""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

from etils import epath

from launch.config_workdir import write_text

ENVIRONMENT_FILE = "environment.json"
MAX_EARLIER = 20

PACKAGES = ("loomlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "numpy",
            "ml-dtypes", "ml-collections", "chex", "tensorstore", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin",
            "jax-rocm7-plugin", "tokamax", "tokenizers", "sentencepiece", "tiktoken", "pyarrow")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION",
             "JAX_COMPILATION_CACHE_DIR", "CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS", "NCCL_ALGO")


def version(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(folder: pathlib.Path, tracked: str | None = None,
              apart_from: tuple[str, ...] = ()) -> dict[str, Any] | None:
    """{"revision", "dirty"} of the repository around `folder`; None without one, or where git does not run.

    tracked: a file that the repository must know: an installed copy may lie inside an unrelated one. apart_from: paths
    from the top of the repository whose changes do not make it dirty.
    """
    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10,
                                  check=False, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"})
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    revision = git("rev-parse", "HEAD")
    if not revision or (tracked is not None and git("ls-files", "--error-unmatch", tracked) is None):
        return None
    changes = git("status", "--porcelain", "--", ":(top)", *(f":(top,exclude){path}" for path in apart_from))
    return {"revision": revision, "dirty": None if changes is None else bool(changes)}


def git_states(config_spec: str | None = None) -> dict[str, Any]:
    """State of this project's repository, and of the experiment's: around its file, else the current folder."""
    here = pathlib.Path(__file__).resolve()
    experiment = pathlib.Path((config_spec or "").partition(".py:")[0]).absolute()
    folder = experiment.parent if config_spec and "://" not in config_spec else pathlib.Path.cwd()
    return {"project": git_state(here.parent, here.name), "experiment": git_state(folder) if folder.is_dir() else None}


def devices() -> dict[str, Any]:
    """Platform, kind and number of devices, and of processes. Starts jax's backend."""
    import jax
    found = jax.devices()
    return {"platform": found[0].platform, "kind": found[0].device_kind, "count": len(found),
            "local_count": jax.local_device_count(), "processes": jax.process_count(),
            "slices": len({getattr(d, "slice_index", 0) for d in found})}


def collect(config_spec: str | None = None) -> dict[str, Any]:
    """Everything above as JSON-able data. Names of machines and users are not in it (arguments may hold paths)."""
    return {
        "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": git_states(config_spec),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: found for name in PACKAGES if (found := version(name)) is not None},
        "devices": devices(),
        "variables": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
    }


def write_environment(workdir: Any, config_spec: str | None = None) -> dict[str, Any]:
    """Writes environment.json of this start and returns it; earlier starts that differ are kept in it, newest first.

    Call it in the first process only, after `jax.distributed` has been initialised.
    """
    path = epath.Path(workdir) / ENVIRONMENT_FILE
    now = collect(config_spec)
    write_text(path, json.dumps({**now, "earlier": _earlier(path, now)}, indent=2) + "\n")
    return now


def _earlier(path: epath.Path, now: dict[str, Any]) -> list[Any]:
    """The starts that the file holds, without one that equals `now`."""
    if not path.exists():
        return []
    try:
        last = json.loads(path.read_text())
        starts = [{k: v for k, v in last.items() if k != "earlier"}, *last.get("earlier", [])]
    except (json.JSONDecodeError, AttributeError):
        return []  # cut off or edited: a record of starts is no reason to refuse one
    return [start for start in starts if start != now][:MAX_EARLIER]
