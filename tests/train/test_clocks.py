"""Clocks that differ between machines, or jump, decide nothing: checkpoints, rows and trials go by steps and locks."""

import json
import pathlib
import time

import jax
import numpy as np
import pytest
from commands import HERE, losses, run
from runs import MODEL, VOCAB, make_recipe

from launch.sweeps.definition import from_data
from launch.sweeps.study import Queue, open_study
from launch.watch import look
from lm.core.sharding import make_mesh
from lm.models.build import build_model
from lm.train.checkpoint import open_checkpoints
from lm.train.options import CheckpointOptions, LogOptions
from lm.train.writers import MetricsWriter, read_rows

DAY = 86400.0


@pytest.fixture
def shift(monkeypatch):
    """Sets the time of day so many seconds off."""
    now, now_ns = time.time, time.time_ns

    def by(seconds):
        monkeypatch.setattr(time, "time", lambda: now() + seconds)
        monkeypatch.setattr(time, "time_ns", lambda: now_ns() + int(seconds * 1e9))
    return by


def test_the_newest_checkpoint_is_the_one_of_the_last_step(tmp_path, shift):
    """Each saved by a machine whose clock is a day before that of the one before."""
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    recipe = make_recipe(build_model(MODEL, VOCAB), dict(name="sgd", learning_rate=0.1, schedule="constant"))
    state = recipe.create(0, mesh)
    for step in (1, 2, 3):
        shift(-step * DAY)
        with open_checkpoints(tmp_path, CheckpointOptions(keep=2)) as checkpoints:
            checkpoints.save(step, state, {"step": step})
    with open_checkpoints(tmp_path, CheckpointOptions(keep=2)) as checkpoints:
        assert checkpoints.steps == [2, 3] and checkpoints.latest == 3


def test_rows_are_dropped_by_their_step(tmp_path, shift):
    for start, stop, seconds in ((0, 5, 0.0), (3, 6, -DAY)):
        shift(seconds)
        with MetricsWriter(tmp_path, LogOptions(), start_step=start) as writer:
            for step in range(start + 1, stop + 1):
                writer.write(step, {"train/loss": float(start)})
    assert [(row["step"], row["train/loss"]) for row in read_rows(tmp_path)] == [
        (1, 0.0), (2, 0.0), (3, 0.0), (4, 3.0), (5, 3.0), (6, 3.0)]


def test_trials_are_taken_up_by_locks_whatever_the_clocks_say(tmp_path, shift):
    """One worker lives and has its trial, another died; a third, a day ahead or behind, takes the dead one's alone."""
    grid = from_data({"parameters": {"optimizer.learning_rate": [0.1, 0.2]}}, "x")
    living = Queue(grid, tmp_path).next()
    dead = Queue(grid, tmp_path).next()
    for seconds in (DAY, -2 * DAY):
        dead.release()
        shift(seconds)
        dead = Queue(grid, tmp_path).next()
        assert (living.number, dead.number) == (0, 1)
        assert Queue(grid, tmp_path).next() is None
    for held in (living, dead):
        held.trial.study.tell(held.number, 1.0)
    assert [trial.state.name for trial in open_study(grid, tmp_path).get_trials()] == ["COMPLETE"] * 2


def test_a_run_that_wrote_in_the_future_is_shown(tmp_path, shift):
    (tmp_path / "config.json").write_text(json.dumps({"train": {"steps": 3}}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    shift(-DAY)
    assert look(str(tmp_path))["quiet"] == 0.0


@pytest.mark.slow
def test_a_run_resumed_by_a_machine_whose_clock_is_behind_ends_the_same(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "if 'SHIFT' in os.environ:\n"
        "    off, now, now_ns = float(os.environ['SHIFT']), time.time, time.time_ns\n"
        "    time.time = lambda: now() + off\n"
        "    time.time_ns = lambda: now_ns() + int(off * 1e9)\n")
    path = f"{tmp_path}:{pathlib.Path(HERE).parent.parent}"
    for steps, seconds in ((4, DAY), (8, -DAY), (12, 0.0)):
        code, out = run(tmp_path / "run", f"--config.train.steps={steps}", PYTHONPATH=path, SHIFT=str(seconds))
        assert code == 0, out
    assert run(tmp_path / "whole")[0] == 0
    np.testing.assert_array_equal(losses(tmp_path / "run"), losses(tmp_path / "whole"))
