"""Starts `lm` as users do, in a process of its own, and reads what a run left behind."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
CONFIG = str(HERE / "tiny_experiment.py")
FLAGS = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)


def start(workdir, *flags: str, devices: int = 1, command: str = "train", **env: str) -> subprocess.Popen:
    """`lm train` of the tiny experiment in the background."""
    config = ["--config", CONFIG] if command == "train" else []
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", command, *config, "--workdir", str(workdir), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HERE.parent.parent,
        env={**os.environ, "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={devices}", **env})


def finish(process: subprocess.Popen, timeout: float = 180) -> tuple[int, str]:
    """(exit code, output) of a started command."""
    try:
        out, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out


def run(workdir, *flags: str, **kwargs) -> tuple[int, str]:
    """Starts and waits."""
    return finish(start(workdir, *flags, **kwargs))


def rows(workdir) -> dict[int, dict[str, float]]:
    """Rows of metrics.jsonl that hold a training loss, by step; fails where a step stands twice."""
    out = {}
    for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "train/loss" in row:
            assert row["step"] not in out, f"step {row['step']} is there twice"
            out[row["step"]] = row
    return out


def losses(workdir) -> np.ndarray:
    """Training losses of all steps in order, which must be 1, 2, 3, ..."""
    found = rows(workdir)
    assert list(found) == list(range(1, len(found) + 1))
    return np.array([row["train/loss"] for row in found.values()])
