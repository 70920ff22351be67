"""A disk that is full and places that cannot be written: a line that says so, an exit code, and nothing is lost."""

import errno
import json
import os
import pathlib
import resource
import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import CONFIG, FLAGS, HERE, losses, run

from lm.train.checkpoint import restore_params
from lm.train.options import LogOptions
from lm.train.storage import refusal
from lm.train.writers import MetricsWriter, read_rows

LONG = ("--config.train.steps=60", "--config.checkpoint.every=4", "--config.eval.every=100")


def raised_from(cause):
    error = RuntimeError("saving failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(("error", "says"), [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
    (raised_from(OSError(errno.EROFS, "Read-only file system")), "Read-only"),
    (ValueError("RESOURCE_EXHAUSTED: Error writing local file \"/x/d/1\": No space left"), "RESOURCE_EXHAUSTED"),
    (ValueError("PERMISSION_DENIED: Error reading object gs://b/x"), "PERMISSION_DENIED")])
def test_refusals_of_storage_are_known(error, says):
    assert says in refusal(error)


@pytest.mark.parametrize("error", [
    ValueError("config.train.steps=0 must be at least 1"), FileNotFoundError(errno.ENOENT, "gone"), KeyError("x"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes"), AssertionError()])
def test_other_errors_are_none(error):
    assert refusal(error) is None


def test_a_row_that_could_not_be_written_is_raised_once_and_leaves_the_others(tmp_path, monkeypatch):
    """The disk is full from the third row on, in the middle of a line."""
    with (pytest.raises(OSError) as told, MetricsWriter(tmp_path, LogOptions(tensorboard=False)) as writer):
        for step in (1, 2, 3):
            if step == 3:
                with (tmp_path / "metrics.jsonl").open("a") as file:
                    file.write('{"step": 3, "tr')
                full = os.open("/dev/full", os.O_WRONLY)
                os.dup2(full, writer._file._file.fileno())
            writer.write(step, {"train/loss": 1.0 / step})
    assert told.value.errno == errno.ENOSPC
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]
    with MetricsWriter(tmp_path, LogOptions(tensorboard=False), start_step=2) as writer:
        writer.write(3, {"train/loss": 0.1})
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]


def test_a_dead_tensorboard_thread_does_not_block(tmp_path, monkeypatch):
    with MetricsWriter(tmp_path, LogOptions()) as writer:
        events = writer._board.file_writer.event_writer
        monkeypatch.setattr(events._ev_writer, "write_event", lambda event: 1 / 0)
        import threading
        monkeypatch.setattr(threading, "excepthook", lambda told: None)
        for step in range(1, 40):
            writer.write(step, {f"train/{n}": 1.0 for n in range(20)})
            if step == 1:
                events._worker.join(10)
        assert writer._board is None
    assert len(read_rows(tmp_path)) == 39


def start_limited(workdir: pathlib.Path, limit: int | None) -> tuple[int, str]:
    """A run none of whose files may grow beyond `limit` bytes: writes then fail as on a full disk."""
    set_limit = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", "--config", CONFIG, "--workdir", str(workdir), *LONG],
        cwd=HERE.parent.parent, text=True, timeout=180, preexec_fn=set_limit, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count=1"})
    return done.returncode, done.stdout


def check_goes_on(workdir: pathlib.Path, whole: pathlib.Path) -> None:
    """After what stopped it is mended: every checkpoint is whole, and the same command ends as a run without it."""
    folder = workdir / "checkpoints"
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    assert steps and steps[-1] < 60
    for step in steps:
        assert restore_params(workdir, None, step)[1] == step
    code, out = run(workdir, *LONG)
    assert code == 0, out
    assert run(whole, *LONG)[0] == 0
    np.testing.assert_array_equal(losses(workdir), losses(whole))
    jax.tree.map(np.testing.assert_array_equal, restore_params(workdir, None)[0], restore_params(whole, None)[0])


@pytest.mark.slow
def test_files_that_may_not_grow_end_the_run_with_74(tmp_path):
    workdir = tmp_path / "run"
    assert run(workdir, "--config.train.steps=8", *LONG[1:])[0] == 0
    largest = max(path.stat().st_size for path in workdir.rglob("checkpoints/**/*") if path.is_file())
    code, out = start_limited(workdir, max(largest // 2, 4096))
    assert code == 74, out
    assert f"{workdir} takes no more" in out and "the same command goes on" in out, out
    check_goes_on(workdir, tmp_path / "whole")


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_74(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk; the test above asks the same of files that may not grow")
    try:
        assert run(disk / "run", "--config.train.steps=8", *LONG[1:])[0] == 0
        filler = disk / "filler"
        left = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        filler.write_bytes(b"x" * max(left - 60_000, 0))
        code, out = start_limited(disk / "run", None)
        assert code == 74, out
        assert "takes no more" in out, out
        filler.unlink()
        check_goes_on(disk / "run", tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_result_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from etils import epath

    from lm.core.whole_file import write_text
    write_text(epath.Path(tmp_path) / "final_result.json", json.dumps({"step": 1}))
    monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_text(epath.Path(tmp_path) / "final_result.json", "{}")
    assert json.loads((tmp_path / "final_result.json").read_text()) == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1
