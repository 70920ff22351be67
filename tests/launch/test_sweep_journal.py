"""The journal of a study: what a kill leaves of a lock or of a line harms nobody."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import optuna
import pytest

from launch.sweeps.definition import from_data
from launch.sweeps.journal import JournalLock, drop_torn_line
from launch.sweeps.study import Queue, open_study

GRID = from_data({"parameters": {"optimizer.learning_rate": [0.1, 0.2, 0.3]}}, "x")


def cells(folder):
    return [trial.system_attrs["fixed_params"]["optimizer.learning_rate"]
            for trial in open_study(GRID, folder).get_trials(deepcopy=False)]


@pytest.mark.parametrize(("text", "left"), [
    (b"", b""), (b"a\n", b"a\n"), (b"a\nb", b"a\n"), (b"ab", b""), (b"a\n" + b"b" * 9000, b"a\n"),
    (b"a" * 9000 + b"\n" + b"b" * 4095, b"a" * 9000 + b"\n")])
def test_a_torn_line_is_cut_off(tmp_path, text, left):
    (tmp_path / "x").write_bytes(text)
    drop_torn_line(str(tmp_path / "x"))
    assert (tmp_path / "x").read_bytes() == left


def test_a_study_whose_last_record_is_torn_goes_on(tmp_path):
    Queue(GRID, tmp_path)
    with (tmp_path / "study.journal").open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"x"')  # a kill, or a full disk
    held = Queue(GRID, tmp_path).next()
    held.trial.study.tell(held.number, 1.0)
    assert [trial.state.name for trial in open_study(GRID, tmp_path).get_trials()] == ["COMPLETE", "WAITING", "WAITING"]


@pytest.mark.parametrize("seconds", [-86400.0, 0.0, 86400.0])
def test_a_killed_holder_leaves_no_lock_whatever_the_clocks_say(tmp_path, monkeypatch, seconds):
    """A relative path, as users give it; and a clock a day off on one of the machines."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep").mkdir()
    code = ("import os, sys\nfrom launch.sweeps.journal import JournalLock\n"
            "JournalLock(sys.argv[1]).acquire()\nprint('held', flush=True)\nsys.stdin.read()")
    (tmp_path / "sweep/study.journal").touch()
    holder = subprocess.Popen([sys.executable, "-c", code, "sweep/study.journal"], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + seconds)
    began = time.monotonic()
    Queue(GRID, pathlib.Path("sweep"))
    assert cells(pathlib.Path("sweep")) == [0.1, 0.2, 0.3] and time.monotonic() - began < 10


def test_the_lock_keeps_others_out(tmp_path):
    (tmp_path / "x").touch()
    lock = JournalLock(str(tmp_path / "x"))
    lock.acquire()
    code = ("import fcntl, sys\nfile = open(sys.argv[1])\n"
            "try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept BlockingIOError: print('kept out')")
    ask = lambda: subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.flock")], capture_output=True).stdout
    assert ask() == b"kept out\n"
    lock.release()
    assert ask() == b""


def test_a_grid_whose_begin_was_killed_is_completed(tmp_path, monkeypatch):
    """Killed after each number of queued cells: in the end every cell is there once."""
    enqueue = optuna.Study.enqueue_trial
    for survives in (1, 1, 0):
        left = [survives]

        def cut_off(study, chosen, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            enqueue(study, chosen)
        monkeypatch.setattr(optuna.Study, "enqueue_trial", cut_off)
        with pytest.raises(KeyboardInterrupt):
            Queue(GRID, tmp_path)
    monkeypatch.setattr(optuna.Study, "enqueue_trial", enqueue)
    Queue(GRID, tmp_path)
    assert cells(tmp_path) == [0.1, 0.2, 0.3]


def test_a_trial_that_was_killed_before_its_values_were_drawn_gets_its_own(tmp_path):
    """Values of trial n are drawn from seed + n, by whoever takes it up."""
    random = from_data({"parameters": {"optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
                        "sampler": "random", "trials": 4}, "x")
    values = lambda folder: [trial.params["optimizer.learning_rate"]
                             for trial in open_study(random, folder).get_trials(deepcopy=False)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, cut = Queue(random, tmp_path / "a"), Queue(random, tmp_path / "b")
    for _ in range(3):
        whole.next()
    study = cut.study()
    study.ask()  # and killed before it had chosen
    for _ in range(3):
        cut.next()
    assert values(tmp_path / "b") == values(tmp_path / "a")
