"""Sweeps: every trial once, whatever is killed; pruning; what is refused. Training is a stand-in of milliseconds."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from launch import cli
from launch.sweeps import study, trial
from launch.sweeps.definition import from_data

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = str(ROOT / "tests/train/tiny_experiment.py")
# Trains for a moment: writes an evaluation at each step and the learning rate as the last loss; SIGTERM saves.
FAKE = textwrap.dedent("""
    import json, pathlib, signal, sys, time
    folder, flags = pathlib.Path(sys.argv[1]), dict(f.removeprefix("--config.").split("=", 1) for f in sys.argv[4:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    loss = float(flags["optimizer.learning_rate"])
    if loss == 0.5:
        sys.exit("the loss went away")
    with (folder / "begun").open("a") as file:
        file.write("x")
    done = folder / "metrics.jsonl"
    at = len(done.read_text().splitlines()) if done.exists() else 0
    with done.open("a") as file:
        for step in range(at + 1, int(sys.argv[2]) + 1):
            print(json.dumps({"step": step, "eval/validation/loss": loss}), file=file, flush=True)
            time.sleep(float(sys.argv[3]))
    (folder / "final_result.json").write_text(json.dumps({"eval/validation/loss": loss, "eval/other": -loss}))
""")


@pytest.fixture
def fast(monkeypatch):
    """Trains with the stand-in: so many steps, so many seconds each."""
    def use(steps=2, seconds=0.0):
        monkeypatch.setattr(trial, "POLL_SECONDS", 0.02)
        monkeypatch.setattr(trial, "training_command", lambda workdir, held: [
            sys.executable, "-c", FAKE, str(held.folder), str(steps), str(seconds),
            *trial.overrides(held.trial.user_attrs["values"])])
    return use


def sweep(*words):
    return cli.main(["sweep", *map(str, words)])


def stop_after(seconds):
    """SIGTERM to this process, so long after something here listens to it."""
    def stop():
        while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            time.sleep(0.01)
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()


def trials(workdir):
    definition = from_data(json.loads((workdir / "sweep.json").read_text()), "x")
    return study.open_study(definition, workdir).get_trials(deepcopy=False)


def test_a_grid_runs_every_cell_once_and_failures_keep_their_error(tmp_path, fast, capsys):
    fast()
    flags = ["--config", TINY, "--workdir", tmp_path, "--param", "optimizer.learning_rate=0.1,0.2,0.5",
             "--param", "train.seed=1,2", "--workers", 2]
    assert sweep(*flags) == 1
    states = [one.state.name for one in trials(tmp_path)]
    assert sorted(states) == ["COMPLETE"] * 4 + ["FAIL"] * 2
    said = capsys.readouterr().out
    assert "4 complete, 2 fail of 6" in said and "the loss went away" in said
    assert "best: trial" in said and "--config.optimizer.learning_rate=0.1" in said
    assert all((tmp_path / f"trials/{n:04d}/begun").read_text() == "x" for n, state in enumerate(states)
               if state == "COMPLETE")
    assert sweep(*flags) == 1 and len(trials(tmp_path)) == 6  # the same command again has nothing to do
    assert sweep("show", "--workdir", tmp_path) == 0
    assert "fail" in capsys.readouterr().out


def test_a_search_is_reproduced_by_its_seed_and_may_grow(tmp_path, fast):
    fast(1)
    def values(name, *flags):
        assert sweep("--config", TINY, "--workdir", tmp_path / name, "--param",
                     "optimizer.learning_rate=loguniform(1e-4,1e-2)", "--sampler=random", "--workers=1", *flags) == 0
        return [one.params["optimizer.learning_rate"] for one in trials(tmp_path / name)]
    first = values("a", "--trials=3")
    assert first == values("b", "--trials=3") and len(set(first)) == 3
    assert values("a", "--trials=5")[:3] == first
    with pytest.raises(AssertionError):
        values("a", "--trials=2")  # refused: exit code 2


def test_several_objectives_give_a_front(tmp_path, fast, capsys):
    fast(1)
    assert sweep("--config", TINY, "--workdir", tmp_path, "--param", "optimizer.learning_rate=0.1,0.2", "--workers=1",
                 "--objective=eval/validation/loss", "--objective=eval/other") == 0
    assert capsys.readouterr().out.count("best: trial") == 2


def test_a_missing_objective_fails_the_trial_with_what_there_is(tmp_path, fast, capsys):
    fast(1)
    assert sweep("--config", TINY, "--workdir", tmp_path, "--param", "optimizer.learning_rate=0.1",
                 "--objective=eval/x/loss") == 1
    assert "eval/x/loss is not there; final_result.json has eval/other" in capsys.readouterr().out


def test_a_trial_that_falls_behind_is_pruned(tmp_path, fast):
    fast(40, 0.05)
    assert sweep("--config", TINY, "--workdir", tmp_path, "--param",
                 "optimizer.learning_rate=0.1,0.11,0.12,0.13,0.14,0.9", "--pruner=median", "--workers=1") == 0
    states = [one.state.name for one in trials(tmp_path)]
    assert states == ["COMPLETE"] * 5 + ["PRUNED"]
    assert len((tmp_path / "trials/0005/metrics.jsonl").read_text().splitlines()) < 40


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path, fast, capsys):
    fast(30, 0.05)
    flags = ["--config", TINY, "--workdir", tmp_path, "--param", "optimizer.learning_rate=0.1,0.2", "--workers=1"]
    stop_after(1.0)
    assert sweep(*flags) == 75
    assert [one.state.name for one in trials(tmp_path)] == ["RUNNING", "WAITING"]
    assert sweep("worker", "--workdir", tmp_path) == 0
    assert (tmp_path / "trials/0000/begun").read_text() == "xx"
    steps = [json.loads(line)["step"] for line in (tmp_path / "trials/0000/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 31))


WORKER = """
import sys
from launch import cli
from launch.sweeps import trial
trial.POLL_SECONDS = 0.02
trial.training_command = lambda workdir, held: [
    sys.executable, "-c", sys.argv[2], str(held.folder), "20", "0.05",
    *trial.overrides(held.trial.user_attrs["values"])]
sys.exit(cli.main(["sweep", "worker", "--workdir", sys.argv[1], "--workers", "1"]))
"""


def test_a_killed_worker_loses_no_trial_and_none_runs_twice_at_once(tmp_path, fast):
    fast(20, 0.05)
    # Begun and stopped at once, so that only the workers below run trials.
    stop_after(0.2)
    sweep("--config", TINY, "--workdir", tmp_path, "--param", "optimizer.learning_rate=0.1,0.2,0.3,0.4", "--workers=1")
    start = lambda: subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), FAKE], cwd=ROOT,
                                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    victim = start()
    limit = time.monotonic() + 60
    while not list(tmp_path.glob("trials/*/metrics.jsonl")) and time.monotonic() < limit:
        time.sleep(0.02)
    victim.kill()  # its training goes on alone, and keeps its trial
    victim.wait()
    workers = [start(), start()]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    assert sweep("worker", "--workdir", tmp_path, "--workers=1") == 0  # what the orphan had is read
    assert [one.state.name for one in trials(tmp_path)] == ["COMPLETE"] * 4
    for folder in (tmp_path / "trials").iterdir():
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 21)), folder


@pytest.mark.parametrize(("kills", "state"), [(4, "COMPLETE"), (9, "FAIL")])
def test_a_training_that_is_killed_is_started_again_but_not_for_ever(tmp_path, fast, monkeypatch, kills, state):
    fast(1)
    whole = trial.training_command
    count = tmp_path / "kills"
    killed = (f"import os, pathlib; p = pathlib.Path({str(count)!r}); p.open('a').write('x')\n"
              f"if len(p.read_text()) <= {kills}: os.kill(os.getpid(), 9)\n")

    def command(workdir, held):
        python, c, code, *flags = whole(workdir, held)
        return [python, c, killed + code, *flags]
    monkeypatch.setattr(trial, "training_command", command)
    assert sweep("--config", TINY, "--workdir", tmp_path / "s", "--param", "optimizer.learning_rate=0.1",
                 "--workers=1") == (state == "FAIL")
    assert [one.state.name for one in trials(tmp_path / "s")] == [state]
    assert len(count.read_text()) == 5


@pytest.mark.parametrize(("flags", "says"), [
    (["--param", "optimizer.learning_rat=1,2"], "did you mean"),
    (["--param", "optimizer.learning_rate"], "PATH=VALUES"),
    ([], "varies nothing"), (["--param", "train.steps=10,-3"], "steps"), (["worker"], "it is no sweep"),
    (["shwo"], "did you mean 'show'"), (["worker", "--trials=3"], "leave out --trials")])
def test_mistakes_are_refused_before_anything_runs(tmp_path, flags, says, capsys):
    given = [] if flags[:1] in (["worker"], ["shwo"]) else ["--config", TINY]
    assert sweep(*flags, *given, "--workdir", tmp_path / "x") == 2
    assert says in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_another_sweep_in_the_same_folder_is_refused(tmp_path, fast, capsys):
    fast(1)
    base = ["--config", TINY, "--workdir", tmp_path, "--workers=1"]
    assert sweep(*base, "--param", "optimizer.learning_rate=0.1") == 0
    assert sweep(*base, "--param", "optimizer.learning_rate=0.1,0.2") == 2
    assert "holds another sweep (parameters" in capsys.readouterr().err
    assert sweep(*base, "--param", "optimizer.learning_rate=0.1", "--config.train.steps=5") == 2
    assert "its config differs" in capsys.readouterr().err


def test_a_broken_experiment_file_is_one_line_and_workers_are_at_least_one(tmp_path, fast, capsys):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    assert sweep("--config", f"{broken}:tiny", "--workdir", tmp_path / "x") == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert sweep("--config", TINY, "--workdir", tmp_path / "x", "--param", "optimizer.learning_rate=0.1",
                 "--workers=0") == 2
    assert "--workers=0" in capsys.readouterr().err


@pytest.mark.slow
def test_real_runs_are_swept_from_the_file_itself(tmp_path):
    path = tmp_path / "swept.py"
    path.write_text((ROOT / "tests/train/tiny_experiment.py").read_text() + textwrap.dedent("""

        def sweep():
            return dict(parameters={"optimizer.learning_rate": [1e-3, 3e-3]}, objectives=["eval/validation/loss"])
    """))
    done = subprocess.run([sys.executable, "-m", "launch.cli", "sweep", "--config", str(path), "--workdir",
                           str(tmp_path / "s"), "--workers", "2", "--config.train.steps=6"], cwd=ROOT, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 complete of 2" in done.stdout
    assert len({one.value for one in trials(tmp_path / "s")}) == 2
