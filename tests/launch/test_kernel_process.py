"""Processes that compile: what they answer, and that none outlives who started it."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from launch.kernels.process import answer

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_an_answer_is_the_last_line_of_json_or_says_what_happened(tmp_path):
    def run(code, limit=30):
        (tmp_path / "made_module.py").write_text(code)
        return answer([sys.executable, "-m", "made_module", "word"], {**os.environ, "PYTHONPATH": str(tmp_path)}, limit)
    assert run("import json, sys; print(json.dumps(sys.argv[1:])); print('{}')") == {}
    assert run("print('words'); print('{\"status\": \"ok\"}')") == {"status": "ok"}
    assert run("1 / 0")["reason"] == "exit code 1: ZeroDivisionError: division by zero"
    assert run("import time; time.sleep(60)", 0.5) == {"status": "timeout", "reason": "not done after 0.5 s"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux' prctl")
def test_a_compiler_ends_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "sleeper.py").write_text(
        "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)")
    code = ("import os, sys; from launch.kernels.process import answer; "
            "answer([sys.executable, '-m', 'sleeper', *sys.argv[1:]], dict(os.environ), 50)")
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pid")], cwd=ROOT,
                              env={**os.environ, "PYTHONPATH": str(tmp_path)})
    limit = time.monotonic() + 30
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < limit:
        time.sleep(0.05)
    child = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    while time.monotonic() < limit:
        try:
            state = pathlib.Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    os.kill(child, 9)
    pytest.fail("the child went on")
