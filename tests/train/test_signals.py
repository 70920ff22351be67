"""Signals become flags, twice Ctrl-C ends at once, and handlers come back. Several processes: tests/launch."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from lm.train.signals import Preemption


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop_once_and_the_old_handler_comes_back(which, capfd):
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    with Preemption(every=10) as preemption:
        assert not preemption.agreed(10)
        os.kill(os.getpid(), which)
        assert preemption.received == which
        assert preemption.agreed(11)  # one process stops at once, not only at steps divisible by `every`
    assert {s: signal.getsignal(s) for s in before} == before
    assert f"{which.name} received: saving" in capfd.readouterr().err


def test_a_second_ctrl_c_interrupts_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.agreed(1)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("not interrupted")
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_after_sigterm_and_repeated_sigterm_still_save():
    with Preemption() as preemption:
        for which in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), which)
        assert preemption.agreed(1)


def test_a_thread_cannot_set_handlers_and_says_so(caplog):
    before, seen = signal.getsignal(signal.SIGTERM), []

    def body():
        with Preemption() as preemption:
            seen.append((signal.getsignal(signal.SIGTERM), preemption.agreed(1)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
    assert "will not save a checkpoint" in caplog.text


def test_outside_the_block_sigterm_ends_the_process_as_ever():
    code = ("import os, signal; from lm.train.signals import Preemption\n"
            "with Preemption() as p:\n    os.kill(os.getpid(), signal.SIGTERM); assert p.agreed(1)\n"
            "os.kill(os.getpid(), signal.SIGTERM)")
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGTERM


def test_every_must_be_positive():
    with pytest.raises(ValueError, match="every=0"):
        Preemption(every=0)
