"""A process that holds up the others is named, with how much; one process asks nobody."""

import re

import numpy as np
import pytest
from commands import HERE, finish, start
from test_runs import free_port

from lm.train.stragglers import Stragglers, probe_seconds, slow_lines

NAMES = ["a", "b", "c", "d"]


def test_what_is_far_behind_the_median_is_named():
    found = np.array([[0.01, 1.0], [0.012, 1.1], [0.31, 1.2], [0.01, 2.5]])
    lines = slow_lines(found, 1.0, NAMES)
    assert list(lines) == [(2, "batch"), (3, "devices")]
    assert "process 2 (c)" in lines[2, "batch"] and "0.31 s" in lines[2, "batch"] and "0.01 s" in lines[2, "batch"]
    assert "process 3 (d)" in lines[3, "devices"] and "2.3 times" in lines[3, "devices"]
    assert slow_lines(found, 10.0, NAMES).keys() == {(3, "devices")}  # 0.3 s of a step of 10 s hold up nobody
    assert slow_lines(np.array([[0.0, 1.0], [0.5, 1.0]]), 1.0, NAMES).keys() == {(1, "batch")}  # of two processes


def test_only_one_that_stays_slow_is_named():
    others = np.array([0.01, 1.0], np.float32)

    def gather(values):
        return np.stack([values if values.dtype == np.uint8 else others, others if values.dtype != np.uint8 else values,
                         values])
    watch = Stragglers(count=3, probe=lambda: 1.0, gather=gather, name="h")
    assert watch.look(0.5, None) == []   # no step time yet
    assert watch.look(0.5, 1.0) == []    # a moment
    assert len(watch.look(0.5, 1.0)) == 1
    assert watch.look(0.01, 1.0) == [] and watch.look(0.5, 1.0) == []


def test_one_process_measures_and_gathers_nothing():
    def never(*_):
        raise AssertionError
    assert Stragglers(count=1, probe=never, gather=never).look(9.0, 1.0) == []
    assert probe_seconds() > 0


@pytest.mark.slow
def test_two_processes_name_the_one_whose_batches_are_slow(tmp_path):
    """The second process sleeps before each batch."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "if os.environ.get('JAX_PROCESS_ID') == '1':\n"
        "    import lm.data.loader as loader\n"
        "    whole = loader.iterate\n"
        "    def iterate(*args, **kwargs):\n"
        "        for one in whole(*args, **kwargs):\n"
        "            time.sleep(0.2)\n"
        "            yield one\n"
        "    loader.iterate = iterate\n")
    address = f"127.0.0.1:{free_port()}"
    started = [start(tmp_path / "run", "--config.mesh.fsdp=2", "--config.train.steps=20", "--config.log.every=4",
                     JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(n),
                     PYTHONPATH=f"{tmp_path}:{HERE.parent.parent}") for n in range(2)]
    outs = [finish(process) for process in started]
    assert [code for code, _ in outs] == [0, 0], outs
    assert re.search(r"process 1 \(.*\) is slow: it takes 0\.2\d* s to get a batch", outs[0][1]), outs[0][1]
    assert not re.search(r"process 0 \(.*to get a batch", outs[0][1]), outs[0][1]
