"""Trials that share a program: grouped by what they differ in, each with its own end, and alone where the process that
trains them breaks or says so. Training is a stand-in of milliseconds, but for the slow test at the end."""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time
import types

import pytest
from test_sweep import FAKE, TINY, fast, sweep, trials  # noqa: F401  fast is a fixture

from launch.sweeps import group_process, groups

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Ends with argv[2] before anything, or, of all trials, does an evaluation a step until `stop` lies in a folder; the
# learning rate is the loss, and 0.5 breaks. argv[3]: trials that are left unfinished when it is killed.
GROUP = textwrap.dedent("""
    import json, os, pathlib, signal, sys, time
    trials = json.loads(pathlib.Path(sys.argv[1]).read_text())
    with (pathlib.Path(sys.argv[1]).parents[2] / "groups").open("a") as file:
        print(len(trials), file=file)
    if int(sys.argv[2]):
        sys.exit(int(sys.argv[2]))
    for trial in trials:
        folder, loss = pathlib.Path(trial["folder"]), float(dict(trial["overrides"])["optimizer.learning_rate"])
        if len(trials) - trials.index(trial) <= int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        code = 76 if loss == 0.5 else 0
        for step in range(1, 6):
            with (folder / "metrics.jsonl").open("a") as file:
                print(json.dumps({"step": step, "eval/validation/loss": loss}), file=file, flush=True)
            time.sleep(float(sys.argv[4]))
            if (folder / "stop").exists():
                code = 75
                break
        (folder / "final_result.json").write_text(json.dumps(
            {"exit_code": code, "eval/validation/loss": loss, "train/bad_step": 3.0}))
""")


@pytest.fixture
def grouped(monkeypatch, fast):  # noqa: F811
    """Groups are trained by the stand-in."""
    def use(code=0, unfinished=0, seconds=0.0):
        fast()
        monkeypatch.setattr(groups, "group_command", lambda workdir, file: [
            sys.executable, "-c", GROUP, str(file), str(code), str(unfinished), str(seconds)])
    return use


def sizes(workdir):
    return [int(line) for line in (workdir / "groups").read_text().split()]


def test_trials_that_differ_in_scalars_are_one_group_and_keep_their_own_ends(tmp_path, grouped, capsys):
    grouped()
    assert sweep("--config", TINY, "--workdir", tmp_path, "--param", "model.embed_dim=16,32", "--param",
                 "optimizer.learning_rate=0.1,0.2,0.5", "--workers=1", "--vmap=6") == 1
    assert sizes(tmp_path) == [3, 3]
    assert [one.state.name for one in trials(tmp_path)] == ["COMPLETE", "COMPLETE", "FAIL"] * 2
    assert "loss or gradient of step 4 is not finite" in capsys.readouterr().out
    assert not list(tmp_path.glob("trials/*/begun"))


@pytest.mark.parametrize("code", [78, 1])
def test_a_group_that_would_be_slower_or_breaks_is_run_alone_and_not_tried_again(tmp_path, grouped, code):
    grouped(code=code)
    assert sweep("--config", TINY, "--workdir", tmp_path, "--param", "optimizer.learning_rate=0.1,0.2",
                 "--param=train.seed=1,2", "--workers=1", "--vmap=3") == 0
    assert sizes(tmp_path) == [3]
    assert [(tmp_path / f"trials/{n:04d}/begun").read_text() for n in range(4)] == ["x"] * 4
    assert {one.state.name for one in trials(tmp_path)} == {"COMPLETE"}


def test_what_a_killed_group_left_goes_on_alone_and_nothing_is_run_twice(tmp_path, grouped):
    grouped(unfinished=2)
    assert sweep("--config", TINY, "--workdir", tmp_path, "--param", "optimizer.learning_rate=0.1,0.2,0.3,0.4",
                 "--workers=1", "--vmap=4") == 0
    assert {one.state.name for one in trials(tmp_path)} == {"COMPLETE"} and len(trials(tmp_path)) == 4
    assert [(tmp_path / f"trials/{n:04d}/begun").exists() for n in range(4)] == [False, False, True, True]


def test_a_trial_that_falls_behind_leaves_its_group(tmp_path, grouped):
    """The median is that of trials that have ended: of the first group."""
    grouped(seconds=0.05)
    assert sweep("--config", TINY, "--workdir", tmp_path, "--pruner=median", "--workers=1", "--vmap=5", "--param",
                 "optimizer.learning_rate=0.1,0.11,0.12,0.13,0.14,0.9,0.105") == 0
    assert [one.state.name for one in trials(tmp_path)] == ["COMPLETE"] * 5 + ["PRUNED", "COMPLETE"]
    assert sizes(tmp_path) == [5, 2] and not (tmp_path / "trials/0005/stop").exists()


def test_what_shares_a_program_is_told_by_the_config(tmp_path):
    from launch import config as configs
    (tmp_path / "config.json").write_text(configs.to_json(configs.load(TINY)))
    program = lambda *overrides: groups.program_of(tmp_path, overrides)
    assert program() == program(("optimizer.learning_rate", "0.5"), ("train.seed", "9"),
                                ("optimizer.weight_decay", "0.3"))
    assert program() != program(("optimizer.weight_decay", "0"))
    assert program() != program(("model.embed_dim", "32"))
    muon = [("optimizer.name", "muon"), ("optimizer.adam_learning_rate", "0.01")]
    assert program(*muon) != program(*muon, ("optimizer.learning_rate", "0.5"))


def test_the_choice_is_what_was_measured_and_is_kept_for_its_device(tmp_path, monkeypatch):
    import jax

    from lm.train import group_speed
    monkeypatch.setattr(group_process, "why_alone", lambda prepared: None)
    measured, found = [], iter([[5.0, 3.0, 1.0], [5.0, 3.0, 1.0], [6.0, 5.0, 4.0], [3.9, 3.9, 3.9]])
    cpus = jax.devices()[:2]

    def times(experiments, options, mesh, devices, alone):
        measured.append(len(experiments))
        assert alone is None
        return group_speed.Times([2.0, 4.0, 9.0], {"vmap": [9.0, 9.0, 9.0], "map": next(found)})

    monkeypatch.setattr(group_speed, "step_times", times)
    prepared, file = [types.SimpleNamespace(options=None, mesh=None)], tmp_path / "x.json"
    first = group_process.choose(prepared, [0, 0], file, cpus)
    assert first["together"] and first["way"] == "map" and "1.33 times" in first["why"]
    assert group_process.choose(prepared, [0, 0], file, cpus) == first and measured == [2]
    assert group_process.choose(prepared, [0, 0], file, cpus[:1])["together"] and measured == [2, 2]
    slower = group_process.choose(prepared, [0, 0, 0], tmp_path / "y.json", cpus)
    assert not slower["together"] and "0.80 times" in slower["why"]
    hardly = group_process.choose(prepared, [0, 0, 0], tmp_path / "x3.json", cpus)
    assert not hardly["together"] and "1.03 times" in hardly["why"]
    monkeypatch.setattr(group_process, "why_alone", lambda prepared: "a loss of preferences")
    assert "run alone: a loss of" in group_process.choose(prepared, [0, 0], tmp_path / "z.json", cpus)["why"]


def test_a_cpu_is_a_device_a_core_but_where_xla_was_told_or_others_work_beside(monkeypatch):
    import jax
    made = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: made.append((name, value)))
    monkeypatch.setattr("launch.claim_grid.default_jobs", lambda: 6)
    for flags in ("--xla_cpu_multi_thread_eigen=false", "--xla_force_host_platform_device_count=3"):
        monkeypatch.setenv("XLA_FLAGS", flags)
        group_process.a_device_a_core()
    assert made == []
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    group_process.a_device_a_core()
    assert made == [("jax_num_cpu_devices", 6)]


def test_a_mesh_that_splits_a_run_is_told_from_one_over_all_devices():
    from launch import config as configs
    split = lambda *overrides: group_process.splits_runs(configs.load(TINY, overrides))
    assert not split() and not split(("mesh.data", "-1"), ("mesh.fsdp", "1"))
    assert split(("mesh.tensor", "2")) and split(("mesh.dcn.data", "2"))


FLAGS = ["--param=optimizer.learning_rate=1e-3,3e-3", "--param=train.seed=1,2", "--workers=1"]


def environment(devices):
    """Of a process with so many CPU devices."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return {**os.environ, "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])}


def command(*words, devices=1):
    return subprocess.Popen([sys.executable, "-m", "launch.cli", *map(str, words)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(devices))


def done(*words, devices=1):
    process = command(*words, devices=devices)
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, out


def rows(workdir, number):
    lines = (workdir / f"trials/{number:04d}/metrics.jsonl").read_text().splitlines()
    found = {row["step"]: row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row}
    assert list(found) == list(range(1, len(found) + 1))
    return list(found.values())


def set_choice(workdir, program, devices, way):
    """What was measured is set aside: numbers are compared, on a machine that others use."""
    import jax
    for count in (2, 3, 4):
        record = workdir / f"together/{program}-{count}.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({
            "device": f"{devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}", "together": True,
            "way": way, "why": "trained together: so says the test"}))


@pytest.mark.slow
@pytest.mark.parametrize("devices, way", [(1, "vmap"), (3, "map")])
def test_real_trials_together_are_those_alone_and_resumable_by_lm_train(tmp_path, devices, way):
    """Four trials over three devices: two on each of two."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    done("sweep", "--config", TINY, "--workdir", alone, *FLAGS)
    set_choice(together, groups.program_of(alone, []), devices, way)
    done("sweep", "--config", TINY, "--workdir", together, *FLAGS, "--vmap=4", devices=devices)
    values = lambda workdir: [one.value for one in trials(workdir)]
    assert values(together) == pytest.approx(values(alone), rel=1e-5)
    for number in range(4):
        assert "so says the test" in (together / f"trials/{number:04d}/log.txt").read_text()
        assert rows(together, number) == pytest.approx(rows(alone, number), rel=1e-5)
    done("train", "--workdir", together / "trials/0003", "--config.train.steps=14")
    assert len(rows(together, 3)) == 14


@pytest.mark.slow
def test_a_group_that_is_killed_at_any_point_loses_and_doubles_nothing(tmp_path):
    """With signal 9: the process of the group, and what started it too, as when a machine dies. What is left goes on
    alone, or in a new group."""
    draw, whole, warm = random.Random(40), tmp_path / "whole", [*FLAGS, "--config.train.steps=60"]
    done("sweep", "--config", TINY, "--workdir", whole, *warm)
    program, killed = groups.program_of(whole, []), 0
    for attempt, machine in enumerate([False, True, True, False]):
        workdir = tmp_path / str(attempt)
        set_choice(workdir, program, 2, "map")
        words = ["sweep", "--config", TINY, "--workdir", workdir, *warm, "--vmap=4"]
        process = command(*words, devices=2)
        step, metrics = draw.randrange(1, 55), workdir / f"trials/000{draw.randrange(4)}/metrics.jsonl"
        while process.poll() is None and (not metrics.exists() or metrics.read_text().count("train/loss") < step):
            time.sleep(0.001)
        if machine:
            process.kill()
        for pid in of_groups(workdir):
            os.kill(pid, signal.SIGKILL)
            killed += 1
        out, _ = process.communicate(timeout=500)
        assert machine or process.returncode == 0, out
        if machine:
            done(*words, devices=2)
        assert [one.state.name for one in trials(workdir)] == ["COMPLETE"] * 4
        assert [one.params for one in trials(workdir)] == [one.params for one in trials(whole)]
        for number in range(4):
            assert len(rows(workdir, number)) == 60
            assert rows(workdir, number) == pytest.approx(rows(whole, number), rel=1e-5)
    assert killed >= 3, f"the groups had ended before, but for {killed}"


def of_groups(workdir):
    """Processes that train groups of this sweep."""
    for folder in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_text()
            if "group_process" in words and str(workdir) in words:
                yield int(folder.name)
