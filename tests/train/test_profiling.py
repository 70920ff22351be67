"""A trace appears for the steps asked for, and for no others."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from lm.train.profiling import Profiler, copy_files, parse_range


@pytest.mark.parametrize("text", ["", "10", "10:", ":10", "a:b", "10-20", "-1:5", "5:5", "7:5", "1:2:3", "1.5:2"])
def test_a_bad_range_is_refused_and_quoted(text):
    with pytest.raises(ValueError, match=r"--profile '.*START") as error:
        parse_range(text)
    assert repr(text) in str(error.value)


def test_a_range_that_is_never_reached_is_refused():
    assert parse_range(" 3:5 ", 4) == (3, 5)
    with pytest.raises(ValueError, match="never reached in a run of 100 steps"):
        Profiler("100:110", "unused", total_steps=100)


def run(profiler, first, last):
    """Which steps ran while the trace was on."""
    step_fn, x, traced = jax.jit(lambda x: x + 1), jnp.zeros(8), []
    with profiler:
        profiler.at(first)
        for step in range(first + 1, last + 1):
            if profiler.tracing:
                traced.append(step)
            with profiler.step(step):
                x = step_fn(x)
            profiler.at(step, x)
    assert not profiler.tracing
    return traced


def test_a_trace_of_the_asked_steps_appears(tmp_path):
    assert run(Profiler("3:5", tmp_path), 0, 8) == [4, 5]
    (xplane,) = (tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb")
    assert xplane.stat().st_size > 0
    (trace,) = (tmp_path / "profile").glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    named = [e["args"]["step_num"] for e in events if e.get("name") == "train" and "step_num" in e.get("args", {})]
    assert {int(number) for number in named} == {4, 5}


@pytest.fixture
def no_trace(monkeypatch):
    """Counts starts and stops instead of tracing."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


@pytest.mark.parametrize(("first", "last", "expected"), [
    (4, 10, [5, 6]),  # resumed inside the range
    (0, 5, [4, 5]),  # ended inside the range
    (6, 10, []),  # resumed after it
    (0, 3, [])])  # ended before it
def test_resuming_and_ending_inside_the_range(tmp_path, no_trace, first, last, expected):
    assert run(Profiler("3:6", tmp_path), first, last) == expected
    # A trace that would hold no step may be started, but every start has its stop.
    assert no_trace.count("start") == no_trace.count("stop") <= 1


def test_an_error_in_a_step_still_writes_the_trace(tmp_path, no_trace):
    profiler = Profiler("0:5", tmp_path)
    with pytest.raises(RuntimeError, match="boom"), profiler:
        profiler.at(0)
        raise RuntimeError("boom")
    assert no_trace == ["start", "stop"]


def test_none_traces_nothing(tmp_path, no_trace):
    assert run(Profiler(None, tmp_path), 0, 5) == []
    assert no_trace == []


def test_copy_keeps_the_folders(tmp_path):
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c" / "x.pb").write_bytes(b"\x00\x01")
    copy_files(tmp_path / "a", epath.Path(tmp_path / "out"))
    assert (tmp_path / "out" / "b" / "c" / "x.pb").read_bytes() == b"\x00\x01"
