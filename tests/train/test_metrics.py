"""The meter against a clock that the test moves by hand."""

import time
import types

import jax
import jax.numpy as jnp
import pytest

from lm.train.metrics import PerfMeter, common_peak, mfu, peak_memory


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def device(kind: str = "NVIDIA H200", peak_bytes: int | None = None):
    stats = None if peak_bytes is None else {"peak_bytes_in_use": peak_bytes}
    return types.SimpleNamespace(device_kind=kind, process_index=0, memory_stats=lambda: stats)


def one_step(meter, clock, wait, run):
    with meter.waiting():
        clock.pass_(wait)
    clock.pass_(run)
    meter.stepped(())


def test_windows_leave_out_the_compile_step_and_pauses():
    clock = Clock()
    meter = PerfMeter(1000, 2e9, [device(), device()], clock=clock)
    clock.pass_(7.0)  # the caller still builds other things
    one_step(meter, clock, wait=1.0, run=30.0)  # compiles
    for _ in range(4):
        one_step(meter, clock, wait=0.1, run=0.4)
    with meter.paused():
        clock.pass_(1000.0)
        with meter.waiting():  # evaluation data is not training data
            clock.pass_(5.0)
    for _ in range(4):
        one_step(meter, clock, wait=0.1, run=0.4)
    row = meter.report()
    assert row["perf/compile_time"] == pytest.approx(30.0)
    assert row["perf/step_time"] == pytest.approx(0.5)
    assert row["perf/tokens_per_sec"] == pytest.approx(2000.0)
    assert row["perf/tokens_per_sec_per_device"] == pytest.approx(1000.0)
    assert row["perf/data_wait"] == pytest.approx(0.2)
    # By hand: 3 passes * 2 GFLOP * 2000 tokens a second over two H200.
    assert row["perf/mfu"] == pytest.approx(12e12 / (2 * 989e12))

    one_step(meter, clock, wait=0.0, run=2.0)
    second = meter.report()
    assert second["perf/step_time"] == pytest.approx(2.0) and second["perf/data_wait"] == 0.0
    assert "perf/compile_time" not in second


def test_the_summary_has_the_median_step_time_and_the_overall_wait():
    clock = Clock()
    meter = PerfMeter(10, None, [device()], clock=clock)
    one_step(meter, clock, 0, 9)
    for run in (1.0, 1.0, 60.0):  # one window is slow
        one_step(meter, clock, 1.0, run)
        meter.report()
    summary = meter.summary()
    assert summary["perf/step_time"] == pytest.approx(2.0)
    assert summary["perf/tokens_per_sec"] == pytest.approx(5.0)
    assert summary["perf/data_wait"] == pytest.approx(3 / 65)
    assert summary["perf/compile_time"] == pytest.approx(9)
    assert summary["perf/mfu"] is None


def test_a_report_without_a_step_claims_no_speed():
    meter = PerfMeter(10, 1.0, [device()], clock=Clock())
    assert "perf/step_time" not in meter.report() and "perf/step_time" not in meter.summary()


@pytest.mark.parametrize("devices", [[device("cpu")], [device("cpu"), device()], [device("NVIDIA L4"), device()]])
def test_mfu_is_none_on_unknown_and_on_mixed_devices(devices):
    assert common_peak(devices) is None
    assert mfu(1000.0, 1e9, common_peak(devices), len(devices)) is None


def test_full_use_of_a_device_is_an_mfu_of_one():
    assert mfu(989e12 / 6e9, 2e9, 989e12, 1) == pytest.approx(1.0)
    assert mfu(989e12 / 6e9, 2e9, 989e12, 1, passes=2) == pytest.approx(2 / 3)


def test_peak_memory_of_the_fullest_device_and_of_this_process():
    assert peak_memory([device(peak_bytes=2**30), device(peak_bytes=3 * 2**30)])["perf/peak_device_memory_gib"] == 3.0
    ours = peak_memory(jax.devices())
    assert "perf/peak_device_memory_gib" not in ours  # CPU devices do not tell
    assert 0.01 < ours["perf/peak_host_memory_gib"] < 1000


def test_measures_real_asynchronous_steps_without_waiting_for_each():
    """A chain of matrix products is dispatched ahead; the window must hold the time of all of them, as a plain
    measurement that waits for the whole chain does."""
    step = jax.jit(lambda x: jnp.tanh(x @ x @ x @ x))
    x = jax.random.normal(jax.random.key(0), (700, 700))
    meter = PerfMeter(1, None, jax.devices()[:1])
    x = step(x)
    meter.stepped(x)
    assert meter.compile_time > 0
    began = time.perf_counter()
    for _ in range(8):
        x = step(x)
        meter.stepped(x)
    jax.block_until_ready(x)
    elapsed = time.perf_counter() - began
    row = meter.report()
    # The window holds the plain measurement whole; half a second is for a machine that is busy in between.
    assert elapsed <= row["perf/step_time"] * 8 <= elapsed + 0.5


def test_a_batch_that_comes_while_the_devices_work_was_not_waited_for():
    class Busy:
        def __init__(self, ready):
            self.is_ready = lambda: ready

    ticks = iter(range(100))
    meter = PerfMeter(1, None, jax.devices()[:1], clock=lambda: float(next(ticks)))
    for ready in (True, False, True):
        with meter.waiting([Busy(ready)]):
            pass
    assert meter._waited == 2.0


def test_flops_count_the_passes_of_all_steps():
    assert PerfMeter(1000, 2e9, [device()], passes=2.0).flops(7) == 2 * 2e9 * 1000 * 7
    assert PerfMeter(1000, None, [device()]).flops(7) is None
