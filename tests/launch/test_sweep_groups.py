"""Trials that share a program: grouped by what they differ in, each with its own end, and alone where the process that
trains them breaks or says so. Training is a stand-in of milliseconds, but for the slow test at the end."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap
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


def test_a_group_that_would_be_slower_is_run_alone_and_not_tried_again(tmp_path, grouped):
    grouped(code=78)
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


@pytest.mark.slow
def test_real_trials_together_are_those_alone_and_resumable_by_lm_train(tmp_path):
    """The measured choice is set aside: what is compared are numbers, on a machine that others use."""
    import jax
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    command = lambda *words: subprocess.run([sys.executable, "-m", "launch.cli", *map(str, words)], cwd=ROOT, text=True,
                                            capture_output=True, timeout=500, env={**os.environ, "XLA_FLAGS": flags})

    def run(name, *words):
        done = command("sweep", "--config", TINY, "--workdir", tmp_path / name, "--workers=1", *words,
                       "--param=optimizer.learning_rate=1e-3,3e-3", "--param=train.seed=1,2")
        assert done.returncode == 0, done.stdout + done.stderr
        return [one.value for one in trials(tmp_path / name)]

    def rows(name, number):
        lines = (tmp_path / name / f"trials/{number:04d}/metrics.jsonl").read_text().splitlines()
        found = {row["step"]: row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row}
        assert list(found) == list(range(1, len(found) + 1))
        return list(found.values())

    alone = run("alone")
    record = tmp_path / f"together/together/{groups.program_of(tmp_path / 'alone', [])}-4.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"device": f"{jax.devices()[0].device_kind}, jax {jax.__version__}", "together": True,
                                  "why": "trained together: so says the test"}))
    assert run("together", "--vmap=4") == pytest.approx(alone, rel=1e-5)
    for number in range(4):
        assert "so says the test" in (tmp_path / f"together/trials/{number:04d}/log.txt").read_text()
        assert rows("together", number) == pytest.approx(rows("alone", number), rel=1e-5)
    done = command("train", "--workdir", tmp_path / "together/trials/0003", "--config.train.steps=14")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows("together", 3)) == 14
