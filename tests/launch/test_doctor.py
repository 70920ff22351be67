"""`lm doctor`: the report of this machine, and exit code 1 where something is broken."""

import argparse
import json

import pytest

from launch import distributed, doctor
from launch.known_problems import BROKEN, NOTE, Problem


def args(**given):
    return argparse.Namespace(**{"workdir": None, "compile_cache": "off", "json": True, "platform_note": None, **given})


@pytest.fixture
def healthy(monkeypatch):
    """No rule applies, whatever is installed here, and nothing is measured."""
    monkeypatch.setattr(doctor, "matmul_speed", lambda dtype: 2e12)
    monkeypatch.setattr(doctor, "known_problems", lambda facts: [])
    monkeypatch.setattr(doctor, "unmet_requirements", lambda versions, requires: [])


def test_the_report_is_json_and_names_versions_devices_and_choices(healthy, capsys, tmp_path):
    assert doctor.main(args(workdir=str(tmp_path / "new" / "run"), platform_note="because")) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"} <= set(report["versions"])
    assert (report["machine"]["platform"], report["machine"]["count"]) == ("cpu", 8)  # conftest's fake devices
    assert report["machine"]["platform_note"] == "because"
    assert report["machine"]["start"].startswith("single process")
    assert report["compile_cache"] == {"folder": None}
    assert report["disk"]["folder"] == str(tmp_path)  # the nearest folder that exists
    assert report["disk"]["free_bytes"] > 0
    from lm.layers.attention_op.dispatch import IMPLEMENTATIONS
    chosen = [value for name, value in report["runs_as"].items() if name.startswith("attention")]
    assert len(chosen) == 2
    assert all(name in IMPLEMENTATIONS for name in chosen)
    assert report["runs_as"]["float32 matrix product, 1024 x 1024"] == "2,000 GFLOP/s"


@pytest.mark.parametrize(("bfloat16", "advice"), [
    (2.0, "bfloat16"), (1.1, "either: equally fast here"), (0.5, "float32")])
def test_the_dtype_that_multiplies_faster_here_is_advised(monkeypatch, bfloat16, advice):
    monkeypatch.setattr(doctor, "matmul_speed", lambda dtype: {"float32": 1.0, "bfloat16": bfloat16}[dtype] * 1e9)
    assert doctor.runs_as()["config.model.dtype, by that"] == advice


def test_the_speed_of_a_matrix_product_is_measured():
    assert 1e6 < doctor.matmul_speed("float32", size=64) < 1e16


def test_the_table_shows_the_same_as_plain_text(healthy, capsys, monkeypatch):
    assert doctor.main(args(json=False, platform_note="because")) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    for words in ("versions", "jaxlib", "8 x cpu (cpu)", "because", "what would run", "GFLOP/s", "no known problem",
                  "unknown device", "compile cache", "off"):
        assert words in text
    monkeypatch.setattr(doctor, "known_problems", lambda facts: [Problem(NOTE, "odd [pair]", "do [this]")])
    assert doctor.main(args(json=False)) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["note: odd [pair]", "    do [this]"]


def test_a_broken_pair_exits_with_1(healthy, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "known_problems", lambda facts: [Problem(BROKEN, "bad pair", "remedy")])
    assert doctor.main(args()) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == [
        {"level": "broken", "what": "bad pair", "remedy": "remedy"}]


def test_a_jax_that_does_not_start_is_reported_not_raised(healthy, monkeypatch, capsys):
    def fail():
        raise RuntimeError("Unable to initialize backend 'tpu':\n  the TPU is in use")

    monkeypatch.setattr(doctor, "devices", fail)
    assert doctor.main(args(json=False)) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "jax does not start: RuntimeError: Unable to initialize backend 'tpu': the TPU is in use" in out
    assert "what would run" not in out


def test_a_half_set_cluster_is_broken(healthy, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    for name in distributed.VARIABLES[1:]:
        monkeypatch.delenv(name, raising=False)
    assert doctor.main(args()) == 1
    assert "JAX_NUM_PROCESSES" in json.loads(capsys.readouterr().out)["problems"][0]["what"]


def test_little_space_is_noted(healthy, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "LOW_DISK_BYTES", 1e30)
    assert doctor.main(args(workdir=str(tmp_path))) == 0
    problem, = json.loads(capsys.readouterr().out)["problems"]
    assert problem["level"] == "note"
    assert "GiB free for the workdir" in problem["what"]


def test_a_workdir_that_cannot_be_written_is_broken(healthy, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor.os, "access", lambda folder, mode: False)
    assert doctor.main(args(workdir=str(tmp_path))) == 1
    assert "cannot be written" in json.loads(capsys.readouterr().out)["problems"][0]["what"]


def test_a_bucket_has_no_free_space(healthy, capsys):
    assert doctor.main(args(workdir="gs://bucket/run")) == 0
    assert json.loads(capsys.readouterr().out)["disk"] == {"folder": "gs://bucket/run"}


def test_the_programs_of_the_cache_are_counted(healthy, capsys, tmp_path):
    (tmp_path / "a-cache").write_bytes(b"12345")
    (tmp_path / "a-atime").write_bytes(b"")
    assert doctor.main(args(compile_cache=str(tmp_path))) == 0
    assert json.loads(capsys.readouterr().out)["compile_cache"] == {
        "folder": str(tmp_path), "programs": 1, "bytes": 5}
