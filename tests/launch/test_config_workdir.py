"""A workdir belongs to one config: another is refused with the differences, but for fields that change no result."""

import contextlib
import logging
import os
import pathlib
import tempfile
import time

import pytest
from etils import epath

from launch import config, config_workdir
from launch.config_workdir import MAY_CHANGE, check_place, check_workdir, check_writable, table, why_allowed, write_text

GIVEN = {"model": {"embed_dim": 64, "num_layers": 2, "attention": {"num_heads": 4}}}


def make(*overrides):
    return config.resolve(GIVEN, [tuple(text.split("=", 1)) for text in overrides])


def stored(workdir):
    return config.from_json((workdir / "config.json").read_text())


def test_a_new_workdir_gets_the_resolved_config(tmp_path):
    check_workdir(tmp_path / "runs" / "x", make("train.steps=5"))
    assert config.diff(stored(tmp_path / "runs" / "x"), make("train.steps=5")) == []
    assert [path.name for path in (tmp_path / "runs" / "x").iterdir()] == ["config.json"]  # no temporary file is left


def test_what_cannot_be_a_workdir_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match="file is a file; give a folder"):
            check_place(str(path))
    with pytest.raises(ValueError, match="--workdir is empty"):
        check_place(" ")

    def missing(self):
        raise ImportError("Please install gcsfs")
    check_place(str(tmp_path / "new" / "run"))
    monkeypatch.setattr(type(epath.Path("gs://bucket/run")), "exists", missing)
    with pytest.raises(ValueError, match=r"gs://bucket/run: Please install gcsfs; pip install gcsfs"):
        check_place("gs://bucket/run")


def test_another_config_is_refused_with_the_differences_and_nothing_is_written(tmp_path):
    check_workdir(tmp_path, make())
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError) as error:
        check_workdir(tmp_path, make("optimizer.learning_rate=0.5", "loss.z_loss=1", "log.every=3"))
    lines = str(error.value).splitlines()
    assert "was made by a different config" in lines[0]
    assert [line.split() for line in lines[1:4]] == [
        ["field", "workdir", "now"], ["config.loss.z_loss", "(absent)", "1.0"],
        ["config.optimizer.learning_rate", "0.001", "0.5"]]
    assert "--allow-config-change" in lines[-1]
    assert (tmp_path / "config.json").read_text() == before


def test_another_config_is_taken_where_that_is_allowed(tmp_path, caplog):
    check_workdir(tmp_path, make())
    with caplog.at_level(logging.INFO):
        check_workdir(tmp_path, make("optimizer.learning_rate=0.5"), allow_change=True)
    assert "config.optimizer.learning_rate from 0.001 to 0.5 (allowed by --allow-config-change)" in caplog.text
    assert stored(tmp_path)["optimizer"]["learning_rate"] == 0.5


@pytest.mark.parametrize("override", [
    "log.every=3", "checkpoint.every=3", "checkpoint.keep=9", "eval.every=3", "mesh.fsdp=2", "train.steps=2000",
    "model.scan=false", "model.remat=full", "model.attention.implementation=reference", "data.prefetch=2",
    "train.hang_seconds=60",
])
def test_fields_that_change_no_result_may_change_and_are_logged(tmp_path, caplog, override):
    check_workdir(tmp_path, make())
    with caplog.at_level(logging.INFO):
        check_workdir(tmp_path, make(override))
    assert f"config of the workdir changed: config.{override.partition('=')[0]} from" in caplog.text
    assert config.diff(stored(tmp_path), make(override)) == []


@pytest.mark.parametrize("override", [
    "train.steps=999", "train.seed=1", "train.batch_size=16", "train.microbatches=2", "model.embed_dim=128",
    "model.attention.window=8", "data.split_seed=1", "model.dtype=float32",
])
def test_fields_that_change_results_may_not(tmp_path, override):
    check_workdir(tmp_path, make())
    with pytest.raises(ValueError, match=f"config.{override.partition('=')[0]}"):
        check_workdir(tmp_path, make(override))


def test_the_same_config_is_not_written_again(tmp_path):
    check_workdir(tmp_path, make())
    before = (tmp_path / "config.json").stat().st_mtime_ns, (tmp_path / "config.json").stat().st_ino
    check_workdir(tmp_path, make())
    assert before == ((tmp_path / "config.json").stat().st_mtime_ns, (tmp_path / "config.json").stat().st_ino)


def test_a_field_that_was_added_since_has_its_default(tmp_path):
    old = make().to_dict()
    del old["train"]["hang_seconds"], old["optimizer"]["ema_decay"]
    (tmp_path / "config.json").write_text(config.to_json(old))
    check_workdir(tmp_path, make())


def test_a_field_that_was_removed_since_is_a_difference(tmp_path):
    old = make().to_dict()
    old["train"]["warp"] = 3
    (tmp_path / "config.json").write_text(config.to_json(old))
    with pytest.raises(ValueError, match=r"config\.train\.warp +3 +\(absent\)"):
        check_workdir(tmp_path, make())


def test_other_processes_check_and_do_not_write(tmp_path):
    check_workdir(tmp_path, make(), write=False)
    assert not (tmp_path / "config.json").exists()


def test_every_rule_names_a_field_that_exists():
    paths = config.flatten(make().to_dict())
    for pattern, why in MAY_CHANGE:
        assert any(why_allowed(path, 1, 2) == why for path in paths), pattern


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = epath.Path(tmp_path) / "config.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\udc80")  # a lone surrogate cannot be encoded
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]


def test_the_table_is_aligned():
    assert table([("config.a", 1, "x"), ("config.long", (1, 2), None)], "A", "B").splitlines() == [
        "  field        A       B", "  config.a     1       'x'", "  config.long  (1, 2)  None"]


@contextlib.contextmanager
def nobody():
    """As a user to whom permissions mean something."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize(("mode", "says"), [
    (0o555, "cannot be written"), (0o000, "cannot be"), (0o333, "cannot be read")])
def test_a_folder_that_may_not_be_used_is_refused_before_anything_runs(mode, says):
    with tempfile.TemporaryDirectory() as parent:  # pytest's own folder is closed to others
        os.chmod(parent, 0o777)
        folder = pathlib.Path(parent) / "runs"
        folder.mkdir()
        os.chown(folder, 65534 if os.geteuid() == 0 else -1, -1)
        folder.chmod(mode)
        try:
            for place in (folder, folder / "new") if mode != 0o333 else (folder,):
                with nobody(), pytest.raises(ValueError, match=says):
                    check_place(str(place))
                    check_writable(str(place))
        finally:
            folder.chmod(0o777)
        with nobody():
            check_place(str(folder))
            check_writable(str(folder))
        assert list(folder.iterdir()) == []


def test_a_new_workdir_is_not_made_by_asking(tmp_path):
    check_writable(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(config_workdir, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(type(epath.Path("gs://bucket/run")), "exists", lambda self: time.sleep(20))
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"gs://bucket/run cannot be read: no answer within 0.2 s; see to the name"):
        check_place("gs://bucket/run")
    assert time.monotonic() - began < 10
