"""`lm doctor`: versions, devices, known problems, and what would run on this machine."""

import argparse
import importlib.metadata
import json
import os
import pathlib
import shutil
import sys
import time
from typing import Any

from launch.accelerators import present_devices
from launch.compile_cache import cache_dir
from launch.environment import PACKAGES, VARIABLES, devices, version
from launch.known_problems import BROKEN, NOTE, Facts, Problem, known_problems, unmet_requirements

LOW_DISK_BYTES = 5 * 2**30
MARGIN = 1.25  # ratio of two speeds below which a busy machine could have made the difference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm doctor`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Prints the report; 1 where something is broken, else 0."""
    report = examine(args.workdir, args.compile_cache, getattr(args, "platform_note", None))
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        from launch.doctor_table import print_report
        print_report(report)
    return 1 if any(problem["level"] == BROKEN for problem in report["problems"]) else 0


def examine(workdir: str | None = None, compile_cache: str | None = None,
            platform_note: str | None = None) -> dict[str, Any]:
    """The report as JSON-able data: versions, machine, runs_as, compile_cache, disk, problems.

    platform_note: why `lm` chose the platform (`choose_platform`), where it did.
    """
    versions = {name: found for name in PACKAGES if (found := version(name)) is not None}
    facts = Facts(versions, tuple(present_devices()), os.environ.get("JAX_PLATFORMS", ""), sys.version_info[:2])
    requires = {name: importlib.metadata.requires(name) or [] for name in versions}
    problems = [*known_problems(facts), *unmet_requirements(versions, requires)]
    machine, device_problems = _devices()
    problems += device_problems
    processes, process_problems = _processes()
    disk, disk_problems = _disk(workdir)
    problems += [*process_problems, *disk_problems]
    return {
        "versions": {"python": sys.version.split()[0], **versions},
        "machine": {"device_files": list(facts.devices), **machine, "platform_note": platform_note,
                    "start": processes,
                    "variables": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}},
        "runs_as": {} if "platform" not in machine else runs_as(),
        "compile_cache": _cache(compile_cache),
        "disk": disk,
        "problems": [problem._asdict() for problem in problems],
    }


def _devices() -> tuple[dict[str, Any], list[Problem]]:
    try:
        found = devices()
    except (RuntimeError, ImportError, AttributeError) as error:
        # What a wrong pair of versions, a busy TPU or a driver that is too old look like from here.
        reason = " ".join(str(error).split())
        return {}, [Problem(BROKEN, f"jax does not start: {type(error).__name__}: {reason}",
                            "try JAX_PLATFORMS=cpu; if that works, the device, its driver or its plugin is the cause")]
    import jax

    from lm.train.devices import device_peak_flops
    found["peak_bf16_flops"] = device_peak_flops(jax.devices()[0])
    unknown = found["platform"] != "cpu" and found["peak_bf16_flops"] is None
    return found, [Problem(NOTE, f"the peak speed of {found['kind']!r} is not known: MFU will not be printed",
                           "add it to lm/train/devices.py with its source")] if unknown else []


def _processes() -> tuple[str, list[Problem]]:
    """How `lm train` would be started here: alone, or joined with other processes, and by what."""
    from launch.distributed import detect, tpu_pod_hosts
    try:
        return detect(os.environ, tpu_pod_hosts).reason, []
    except (ValueError, RuntimeError) as error:
        return "unclear", [Problem(BROKEN, str(error), "`lm train` stops with the same message")]


def runs_as() -> dict[str, str]:
    """The kernels that a training step and a decoding step would choose, and how fast each dtype multiplies here."""
    import jax
    import jax.numpy as jnp

    from lm.layers.attention_op.dispatch import choose
    from lm.layers.attention_op.visibility import Visibility

    def attention(queries: int, keys: int) -> str:
        q, k = (jax.ShapeDtypeStruct((8, n, 8, 64), jnp.bfloat16) for n in (queries, keys))
        return choose(q, k, Visibility(aligned=queries == keys))

    speeds = {dtype: matmul_speed(dtype) for dtype in ("float32", "bfloat16")}
    ratio = speeds["bfloat16"] / speeds["float32"]
    advice = "bfloat16" if ratio > MARGIN else "float32" if ratio < 1 / MARGIN else "either: equally fast here"
    return {
        "attention, training (B8 T1024 H8 K64)": attention(1024, 1024),
        "attention, decoding (one token, 1024 in the cache)": attention(1, 1024),
        **{f"{dtype} matrix product, 1024 x 1024": f"{speed / 1e9:,.0f} GFLOP/s" for dtype, speed in speeds.items()},
        "config.model.dtype, by that": advice,
    }


def matmul_speed(dtype: str, size: int = 1024) -> float:
    """FLOP/s of one size x size matrix product, best of 20 after a warm-up."""
    import jax
    import jax.numpy as jnp
    product = jax.jit(jnp.matmul)
    x = jnp.ones((size, size), dtype)
    product(x, x).block_until_ready()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def _cache(given: str | None) -> dict[str, Any]:
    folder = cache_dir(given)
    if folder is None or "://" in folder:
        return {"folder": folder}
    files = [path for path in pathlib.Path(folder).glob("*") if path.is_file()]
    return {"folder": folder, "programs": sum(not path.name.endswith("-atime") for path in files),
            "bytes": sum(path.stat().st_size for path in files)}


def _disk(workdir: str | None) -> tuple[dict[str, Any], list[Problem]]:
    """Free space where the workdir is, or would be made."""
    if workdir is not None and "://" in workdir:
        return {"folder": workdir}, []
    folder = pathlib.Path(workdir or ".").absolute()
    folder = next(path for path in (folder, *folder.parents) if path.exists())
    free, writable = shutil.disk_usage(folder).free, os.access(folder, os.W_OK)
    problems = []
    if free < LOW_DISK_BYTES:
        problems.append(Problem(
            NOTE, f"{free / 2**30:.1f} GiB free for the workdir; a checkpoint holds parameters and moments (12 bytes a "
            "parameter with AdamW), and several are kept", "lower config.checkpoint.keep, or use another --workdir"))
    if not writable:
        problems.append(Problem(BROKEN, f"{folder} cannot be written", "choose another --workdir"))
    return {"folder": str(folder), "free_bytes": free, "writable": writable}, problems
