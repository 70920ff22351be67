"""Fifty kills with signal 9, at points that a seed draws: of the trainer, of trainings in a sweep, of its drivers and
workers, and of all of them at once as when a machine dies. What comes out is what an uninterrupted run gives."""

import contextlib
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from commands import CONFIG, FLAGS, HERE, finish, losses, run, start

from launch.sweeps.definition import from_data
from launch.sweeps.study import open_study
from lm.train.checkpoint import restore_params

pytestmark = pytest.mark.slow

STEPS = 300
LONG = (f"--config.train.steps={STEPS}", "--config.checkpoint.every=5", "--config.eval.every=100",
        "--config.checkpoint.keep=3")
TRAINER_KILLS = {"time": 8, "step": 6, "save": 6}
# Four trainings: a fifth kill without a checkpoint between, on a slow machine, would rightly fail the trial.
SWEEP_KILLS = {"machine": 14, "driver": 12, "training": 4}
TRIALS, TRIAL_STEPS = 10, 30


def complete_steps(workdir: pathlib.Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def shuffled(kinds: dict[str, int], draw: random.Random) -> list[str]:
    out = [kind for kind, count in kinds.items() for _ in range(count)]
    draw.shuffle(out)
    return out


def wait_for(kind: str, process: subprocess.Popen, workdir: pathlib.Path, draw: random.Random, seconds: float) -> None:
    """Until a drawn time has passed, so many more rows are written, or a checkpoint is half written."""
    metrics, began = workdir / "metrics.jsonl", time.monotonic()
    rows = lambda: metrics.read_text().count("train/loss") if metrics.exists() else 0
    limit, goal = draw.uniform(0.0, seconds), rows() + draw.randrange(1, 25)
    while process.poll() is None:
        waited = time.monotonic() - began
        if (kind == "time" and waited > limit) or (kind == "step" and rows() >= goal) or (
                kind == "save" and waited > 1 and list(workdir.glob("checkpoints/*tmp*"))):
            return
        time.sleep(0.001)


def numbers(workdir: pathlib.Path) -> dict[str, float]:
    """final_result.json without what clocks and memory gave."""
    result = json.loads((workdir / "final_result.json").read_text())
    return {name: value for name, value in result.items() if not name.startswith("perf/")}


def same_training(workdir: pathlib.Path, whole: pathlib.Path) -> None:
    np.testing.assert_array_equal(losses(workdir), losses(whole))
    a, b = (restore_params(where, None) for where in (workdir, whole))
    assert a[1] == b[1] == STEPS
    jax.tree.map(np.testing.assert_array_equal, a[0], b[0])
    assert numbers(workdir) == numbers(whole)


def test_a_trainer_that_is_killed_at_any_point_ends_the_same(tmp_path):
    draw, workdirs = random.Random(20), (tmp_path / f"killed{n}" for n in itertools.count())
    assert run(tmp_path / "warm", "--config.train.steps=4")[0] == 0  # compiled programs are kept
    began = time.monotonic()
    code, out = run(tmp_path / "whole", *LONG)
    assert code == 0, out
    seconds, workdir, kinds = time.monotonic() - began, next(workdirs), shuffled(TRAINER_KILLS, draw)
    while kinds:
        process = start(workdir, *LONG)
        wait_for(kinds[-1], process, workdir, draw, seconds)
        process.send_signal(signal.SIGKILL)
        code, out = finish(process)
        for step in complete_steps(workdir):  # none of them is damaged
            params, found = restore_params(workdir, None, step)
            assert found == step and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
        if code == -signal.SIGKILL:
            kinds.pop()
            continue
        assert code == 0, out  # complete before it was killed: another is killed instead
        same_training(workdir, tmp_path / "whole")
        workdir = next(workdirs)
    code, out = run(workdir, *LONG)
    assert code == 0, out
    same_training(workdir, tmp_path / "whole")


def sweep(workdir: pathlib.Path, log: pathlib.Path) -> subprocess.Popen:
    """The driver where the sweep has not begun, else a worker or the driver."""
    words = ["sweep", "--config", CONFIG, "--param", "train.seed=" + ",".join(map(str, range(1, TRIALS + 1))),
             f"--config.train.steps={TRIAL_STEPS}", "--config.checkpoint.every=5"]
    if (workdir / "sweep.json").exists() and log.stat().st_size % 2:
        words = ["sweep", "worker"]
    with log.open("ab") as out:
        out.write(b".")
        out.flush()
        return subprocess.Popen([sys.executable, "-m", "launch.cli", *words, "--workdir", str(workdir), "--workers=2"],
                                cwd=HERE.parent.parent, stdout=out, stderr=out,
                                env={**os.environ, "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count=1"})


def children(pid: int) -> list[int]:
    """Trainings that a driver has started and that live."""
    out = []
    for folder in pathlib.Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == pid and state != "Z":
                    out.append(int(folder.name))
    return out


def kill(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def trials(workdir: pathlib.Path) -> list:
    definition = from_data(json.loads((workdir / "sweep.json").read_text()), "x")
    return open_study(definition, workdir).get_trials(deepcopy=False)


def alive(pid: int, workdir: pathlib.Path) -> bool:
    """Whether that training still runs: the number may have been given to another since."""
    with contextlib.suppress(OSError):
        return str(workdir) in pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    return False


def same_sweep(workdir: pathlib.Path, whole: pathlib.Path) -> None:
    a, b = trials(workdir), trials(whole)
    assert [one.state.name for one in a] == ["COMPLETE"] * TRIALS
    assert [one.params for one in a] == [one.params for one in b]
    assert len({one.params["train.seed"] for one in a}) == TRIALS
    for n in range(TRIALS):
        one, other = (where / f"trials/{n:04d}" for where in (workdir, whole))
        np.testing.assert_array_equal(losses(one), losses(other))
        assert len(losses(one)) == TRIAL_STEPS and numbers(one) == numbers(other)
    assert [one.values for one in a] == [one.values for one in b]


def complete(workdir: pathlib.Path) -> bool:
    return (workdir / "sweep.json").exists() and [one.state.name for one in trials(workdir)] == ["COMPLETE"] * TRIALS


def strike(kind: str, process: subprocess.Popen, workdir: pathlib.Path, draw: random.Random, orphans: set[int]) -> bool:
    """Kills what `kind` says at a drawn time, adds trainings left alone to `orphans`; whether it killed one."""
    if kind == "training":
        limit = time.monotonic() + 30
        while not children(process.pid) and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
    limit = time.monotonic() + draw.uniform(0.1, 4.0)
    while process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    if kind == "training":
        killed = any(kill(pid) for pid in sorted(children(process.pid))[:1])
        time.sleep(draw.uniform(0.0, 1.0))  # the driver sees it, or not
        orphans |= set(children(process.pid))
        process.terminate()
        process.wait(60)
        return killed
    orphans |= set(children(process.pid))
    killed = process.poll() is None and kill(process.pid)
    process.wait(60)
    if kind == "machine":
        for pid in [pid for pid in orphans if alive(pid, workdir)]:
            kill(pid)
    return killed


def test_a_sweep_whose_processes_are_killed_loses_and_doubles_nothing(tmp_path):
    draw, orphans, log, process = random.Random(30), set(), tmp_path / "log", None
    workdirs = (tmp_path / f"killed{n}" for n in itertools.count())
    log.touch()
    assert sweep(tmp_path / "whole", log).wait(300) == 0, log.read_text()
    workdir, kinds = next(workdirs), shuffled(SWEEP_KILLS, draw)
    try:
        while kinds:
            process = sweep(workdir, log)
            if strike(kinds[-1], process, workdir, draw, orphans):
                kinds.pop()
            elif complete(workdir):  # before its process was killed: another sweep's is killed instead
                same_sweep(workdir, tmp_path / "whole")
                workdir = next(workdirs)
        limit = time.monotonic() + 240
        while not complete(workdir) and time.monotonic() < limit:
            assert sweep(workdir, log).wait(240) == 0, log.read_text()  # 0: nothing failed
            time.sleep(0.5)  # what an orphan still has is read by the next
    finally:
        if process is not None and process.poll() is None:
            orphans |= set(children(process.pid))
            process.kill()
        for pid in orphans:
            if any(alive(pid, path) for path in tmp_path.glob("killed*")):
                kill(pid)
    same_sweep(workdir, tmp_path / "whole")
