"""A hang ends the process with its stacks; everything else leaves it alone. In a process of its own each time."""

import subprocess
import sys
import time

import pytest

from lm.train.watchdog import Watchdog


def run(body, workdir, timeout=60):
    code = ("import sys, time, threading\nfrom lm.train.watchdog import Watchdog\n"
            "def stuck_in_a_collective():\n    time.sleep(300)\n" + body)
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, str(workdir)], capture_output=True, text=True, timeout=timeout)
    return done, time.monotonic() - began


def test_a_hang_ends_with_77_and_the_stacks_of_all_threads(tmp_path):
    done, seconds = run("""
threading.Thread(target=lambda: time.sleep(301), name="loader", daemon=True).start()
with Watchdog(0.5, sys.argv[1], process_index=3) as w:
    w.finished(41)
    w.finished(42)
    stuck_in_a_collective()
""", tmp_path)
    assert done.returncode == 77 and seconds < 30
    saved = (tmp_path / "hang_3.txt").read_text()
    for text in (done.stderr, saved):
        assert "no step finished for 0.5 seconds after step 42" in text
        assert "stuck_in_a_collective" in text and text.count("hread 0x") >= 3
    assert "\x1b" not in done.stderr  # no terminal, no control codes


def test_a_workdir_that_cannot_be_written_does_not_stop_the_end(tmp_path):
    (tmp_path / "file").write_text("")
    done, _ = run("""
with Watchdog(0.3, sys.argv[1]) as w:
    w.finished(1)
    stuck_in_a_collective()
""", tmp_path / "file" / "below")
    assert done.returncode == 77 and "stuck_in_a_collective" in done.stderr


def test_compilation_pauses_and_steady_steps_are_no_hang(tmp_path):
    done, _ = run("""
with Watchdog(1.2, sys.argv[1]) as w:
    time.sleep(2.0)          # compilation, before the first step
    for step in range(1, 6):
        time.sleep(0.3)
        w.finished(step)
    with w.paused():
        time.sleep(2.0)
    time.sleep(0.3)          # the time starts anew after a pause
    w.finished(6)
time.sleep(1.5)              # and ends with the block
print("done")
""", tmp_path)
    assert done.returncode == 0 and done.stdout == "done\n" and done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_closing_does_not_wait(tmp_path):
    began = time.monotonic()
    with Watchdog(1000.0, tmp_path) as watchdog:
        watchdog.finished(1)
    assert time.monotonic() - began < 1.0


def test_none_watches_nothing_and_nonsense_is_refused(tmp_path):
    with Watchdog(None, tmp_path) as watchdog:
        watchdog.finished(1)
        with watchdog.paused():
            pass
    with pytest.raises(ValueError, match="hang_seconds=0 must be positive"):
        Watchdog(0, tmp_path)
