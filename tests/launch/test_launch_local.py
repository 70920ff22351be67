"""Processes on one machine: what ends a run, and that two of them train as one."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch.places import local
from launch.places.job import Job

ROOT = pathlib.Path(__file__).resolve().parents[2]
SAVES = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: sys.exit(75)); print('up', flush=True); "


def processes(tmp_path, *codes):
    return [local.Process(i, (sys.executable, "-c", code), {}, tmp_path / "logs" / f"process-{i}.log")
            for i, code in enumerate(codes)]


def test_all_done_is_done_and_the_first_is_shown(tmp_path, capfd):
    assert local.run(processes(tmp_path, "print('step 1')", "print('other')"), 5) == 0
    assert "step 1" in capfd.readouterr().err
    assert (tmp_path / "logs/process-1.log").read_text() == "other\n"


def test_the_first_failure_stops_all_and_its_traceback_is_shown(tmp_path, capfd):
    began = time.monotonic()
    code = local.run(processes(tmp_path, SAVES + "time.sleep(60)", "import time; time.sleep(0.5); 1 / 0"), 50)
    said = capfd.readouterr().err
    assert code == 1 and time.monotonic() - began < 20
    assert "process 1 of 2 failed first, with exit code 1" in said and "ZeroDivisionError" in said
    assert str(tmp_path / "logs") in said


def test_a_process_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "KILL_SECONDS", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    began = time.monotonic()
    assert local.run(processes(tmp_path, deaf, "import time; time.sleep(0.5); raise SystemExit(76)"), 50) == 76
    assert time.monotonic() - began < 20


def test_an_exit_code_tells_more_than_the_signal_it_causes():
    assert local.worst([-6, 1, None], (None, 0, 75)) == 1
    assert local.worst([0, -9], (None, 0, 75)) == 1
    assert local.worst([0, 75], (None, 0, 75)) is None


LAUNCHER = """
import pathlib, sys
from launch.places import local
folder = pathlib.Path(sys.argv[1])
sys.exit(local.run([local.Process(i, (sys.executable, "-c", sys.argv[2]), {}, folder / f"{i}.log")
                    for i in range(2)], 20))
"""


@pytest.mark.parametrize(("code", "expected"), [(SAVES + "time.sleep(60)", 75),
                                                ("import time; print('up', flush=True); time.sleep(60)", 143)])
def test_a_signal_is_handed_on_and_all_may_save(tmp_path, code, expected):
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path), code], cwd=ROOT,
                               stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: all((tmp_path / f"{i}.log").exists() and (tmp_path / f"{i}.log").read_text() for i in (0, 1)))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == expected
    finally:
        process.kill()


def wait_for(condition, seconds=30):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_gpus_get_a_process_each():
    job = Job("x", "runs/x", (), {})
    gpus = {"CUDA_VISIBLE_DEVICES": "2,5"}
    plan = local.plan(job, local.Options(), gpus)
    assert [process.env["CUDA_VISIBLE_DEVICES"] for process in plan] == ["2", "5"]
    assert [process.env["JAX_PROCESS_ID"] for process in plan] == ["0", "1"]
    assert local.plan(job, local.Options(processes=1), gpus)[0].env == {}
    with pytest.raises(ValueError, match="one process a GPU"):
        local.plan(job, local.Options(processes=3), gpus)
    assert local.visible_gpus({**gpus, "JAX_PLATFORMS": "cpu"}) == []
