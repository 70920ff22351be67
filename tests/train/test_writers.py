"""Rows survive kills, resume without duplicates, and are valid JSON whatever the numbers."""

import json
import math
import os
import signal
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from lm.train.options import LogOptions
from lm.train.writers import AppendedFile, MetricsWriter, RewrittenFile, read_rows

QUIET = LogOptions(tensorboard=False)


def strict(line):
    """Parses as a JSON parser that knows nothing of Python's NaN does."""
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_row_holds_step_and_scalars_in_order(tmp_path):
    with MetricsWriter(tmp_path, QUIET) as writer:
        writer.write(10, {"train/loss": jnp.float32(1.5), "train/lr": 1e-3, "n": np.int64(3), "perf/mfu": None})
        text = (tmp_path / "metrics.jsonl").read_text()  # before close: the row is already there
    assert text == '{"step": 10, "train/loss": 1.5, "train/lr": 0.001, "n": 3.0, "perf/mfu": null}\n'


def test_nan_and_infinities_are_valid_json_and_come_back(tmp_path):
    with MetricsWriter(tmp_path, QUIET) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": jnp.float32(jnp.nan)})
    line = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert strict(line) == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": "NaN"}
    (row,) = read_rows(tmp_path)
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf and math.isnan(row["d"])


def test_values_that_are_no_scalars_are_named(tmp_path):
    expected = r"'train/x' must be a scalar.*\(3,\)"
    with MetricsWriter(tmp_path, QUIET) as writer, pytest.raises(ValueError, match=expected):
        writer.write(1, {"train/x": np.zeros(3)})


@pytest.mark.parametrize("file_class", [AppendedFile, RewrittenFile])
def test_resume_drops_rows_after_the_restored_step_and_a_torn_last_line(tmp_path, file_class):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    path.write_text('{"step": 10, "a": 1}\n{"step": 20, "a": 2}\n{"step": 30, "a": 3}\n{"step": 20, "e": 4}\n'
                    '{"step": 40, "a"')
    file = file_class(path, 20)
    file.append('{"step": 30, "a": 5}')
    file.close()
    assert [(r["step"], r.get("a")) for r in read_rows(tmp_path)] == [(10, 1), (20, 2), (20, None), (30, 5)]
    assert path.read_text().endswith("}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]  # nothing left beside it


@pytest.mark.parametrize("file_class", [AppendedFile, RewrittenFile])
def test_resume_without_new_rows_still_drops(tmp_path, file_class):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}\n')
    file_class(path, 0).close()
    assert path.read_text() == ""


def test_resume_at_the_last_row_leaves_the_file_untouched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n')
    inode = path.stat().st_ino
    MetricsWriter(tmp_path, QUIET, start_step=10).close()
    assert path.stat().st_ino == inode and path.read_text() == '{"step": 10}\n'


def test_no_row_is_lost_when_the_process_is_killed(tmp_path):
    code = ("import os, sys; from lm.train.writers import MetricsWriter; from lm.train.options import LogOptions\n"
            "w = MetricsWriter(sys.argv[1], LogOptions(tensorboard=False))\n"
            "for s in range(1, 51): w.write(s, {'a': s})\n"
            "os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], timeout=60, cwd=os.getcwd())
    assert done.returncode == -signal.SIGKILL
    assert [r["step"] for r in read_rows(tmp_path)] == list(range(1, 51))


def test_only_process_zero_writes(tmp_path):
    with MetricsWriter(tmp_path, LogOptions(wandb_project="p"), process_index=1) as writer:
        writer.write(1, {"a": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_fails_now_and_then_loses_nothing(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    file = RewrittenFile(path, 0, seconds=0.0)
    file._save, works = (lambda: (_ for _ in ()).throw(OSError("store is away"))), file._save
    file.append('{"step": 1}')
    file._save, file._due = works, 0.0
    file.append('{"step": 2}')
    assert [r["step"] for r in read_rows(tmp_path)] == [1, 2]


def test_rewriting_waits_between_writes(tmp_path):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    file = RewrittenFile(path, 0, seconds=1000.0)
    for step in (1, 2, 3):
        file.append(f'{{"step": {step}}}')
    assert len(read_rows(tmp_path)) == 1  # the first at once, the others when it is time
    file.close()
    assert len(read_rows(tmp_path)) == 3


def events(folder):
    """All events of a folder in the order TensorBoard reads them: a record is length, crc, bytes, crc."""
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at:at + 8], "little")
            yield event_pb2.Event.FromString(data[at + 12:at + 12 + size])
            at += 16 + size


def test_tensorboard_has_the_scalars_and_hides_those_after_the_restored_step(tmp_path, monkeypatch):
    options = LogOptions()
    now = iter(range(1000, 2000))
    with MetricsWriter(tmp_path, options) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"train/loss": 0.5, "perf/mfu": None})
    monkeypatch.setattr("time.time", lambda: 4e9 + next(now))  # a later second: the file name holds it
    with MetricsWriter(tmp_path, options, start_step=20) as writer:
        writer.write(30, {"train/loss": 0.25})
    found = list(events(tmp_path / "tensorboard"))
    scalars = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value]
    assert scalars == [(10, "train/loss", 0.5), (20, "train/loss", 0.5), (30, "train/loss", 0.5),
                       (30, "train/loss", 0.25)]
    starts = [e.step for e in found if e.HasField("session_log")]
    assert starts[-1] == 21  # TensorBoard drops earlier events from this step on


def test_a_missing_wandb_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb_project='p'.*pip install 'loomlm\[wandb\]'"):
        MetricsWriter(tmp_path, LogOptions(tensorboard=False, wandb_project="p"))
    assert list(tmp_path.iterdir()) == []


def test_wandb_continues_the_same_run_over_the_step(tmp_path, monkeypatch):
    calls = []

    class Run:
        def define_metric(self, *args, **kwargs):
            calls.append(("define", args, kwargs))

        def log(self, row):
            calls.append(("log", row))

        def finish(self):
            calls.append(("finish",))

    def init(**kwargs):
        calls.append(("init", kwargs))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    options = LogOptions(tensorboard=False, wandb_project="p")
    for start in (0, 5):
        with MetricsWriter(tmp_path, options, start_step=start, config={"seed": 1}) as writer:
            writer.write(start + 5, {"train/loss": 1.0, "perf/mfu": None})
    first, second = (c[1] for c in calls if c[0] == "init")
    assert first == second and first["project"] == "p" and first["resume"] == "allow" and first["config"] == {"seed": 1}
    assert ("define", ("*",), {"step_metric": "step"}) in calls
    assert [c[1] for c in calls if c[0] == "log"] == [{"step": 5, "train/loss": 1.0}, {"step": 10, "train/loss": 1.0}]
    assert sum(c[0] == "finish" for c in calls) == 2
