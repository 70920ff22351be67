"""Speed of a run, measured so that the devices never wait for the measuring.

JAX dispatches asynchronously: a call of the train step returns before the devices have run it, so the host time of one
call says nothing. The clock is read only where the host has just waited for a step's metrics, which the loop does at
log steps; between two such moments lies a window of whole steps whose length is exact.

    meter = PerfMeter(tokens_per_step, flops_per_token, devices)
    for step in ...:
        with meter.waiting():
            batch = next(batches)
        state, metrics = train_step(state, batch)
        meter.stepped(metrics)                  # waits for the devices only once, after the first step
        if log_step:
            row = jax.device_get(metrics)       # waits for this step
            row |= meter.report()
        if eval_step:
            with meter.paused(metrics):         # waits for the steps in flight; evaluation is not step time
                ...
"""

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from lm.train.devices import device_peak_flops

GIB = 2.0**30


def mfu(tokens_per_sec: float, flops_per_token: float | None, peak: float | None, num_devices: int,
        passes: float = 3.0) -> float | None:
    """Model FLOPs utilisation (Chowdhery et al. 2022, PaLM, appendix B): passes * flops_per_token * tokens_per_sec /
    (peak * num_devices), from 0 to 1; None where the FLOPs or the peak are not known.

    tokens_per_sec: over all devices. flops_per_token: of the forward pass. peak: FLOP/s of a device. passes: forward
    and backward together cost this many forward passes: 3, since the backward pass has two products for each product of
    the forward pass. Recomputed activations are not counted.
    """
    if flops_per_token is None or peak is None:
        return None
    return passes * flops_per_token * tokens_per_sec / (peak * num_devices)


def common_peak(devices: Sequence[Any]) -> float | None:
    """Peak FLOP/s of one of the devices; None where one is unknown or they are not all the same kind."""
    peaks = {device_peak_flops(device) for device in devices}
    return peaks.pop() if len(peaks) == 1 else None


def peak_memory(devices: Sequence[Any]) -> dict[str, float]:
    """Highest memory use so far in GiB: `perf/peak_host_memory_gib` is this process's resident set;
    `perf/peak_device_memory_gib`, where devices of this process report it (CPUs do not), that of the fullest one."""
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    out = {"perf/peak_host_memory_gib": resident / GIB}
    stats = [device.memory_stats() or {} for device in devices if device.process_index == jax.process_index()]
    used = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if used:
        out["perf/peak_device_memory_gib"] = max(used) / GIB
    return out


class PerfMeter:
    """Step time, tokens per second, MFU and the share of time spent waiting for data, window by window.

    tokens_per_step: positions of a batch over all devices, padding included. flops_per_token: forward FLOPs, or None.
    devices: all devices of the mesh. passes: see `mfu`. clock: seconds, monotonic.
    """

    def __init__(self, tokens_per_step: int, flops_per_token: float | None, devices: Sequence[Any], *,
                 passes: float = 3.0, clock: Callable[[], float] = time.perf_counter):
        self.tokens_per_step, self.flops_per_token, self.devices = tokens_per_step, flops_per_token, list(devices)
        self.passes, self.clock = passes, clock
        self.peak = common_peak(self.devices)
        self.compile_time: float | None = None  # seconds of the first step, compilation included
        self._windows: list[tuple[int, float, float]] = []  # steps, seconds, seconds waiting
        self._began, self._started, self._told = clock(), False, False
        self._steps, self._waited, self._fetched = 0, 0.0, 0.0
        self.batch_time = 0.0  # seconds a step to get a batch in the last window, waited for or not

    @contextlib.contextmanager
    def waiting(self, outputs: Any = ()) -> Iterator[None]:
        """Around getting a batch. outputs: results of the last step. If they are still being computed when the batch is
        there, nothing waited for it and nothing is counted; else all of the time is, which is an upper bound."""
        before = self.clock()
        if not self._started:  # what was built between this object and the first step is not compile time
            self._began, self._started = before, True
        try:
            yield
        finally:
            took = self.clock() - before
            self._fetched += took
            if all(leaf.is_ready() for leaf in jax.tree.leaves(outputs)):
                self._waited += took

    def stepped(self, outputs: Any) -> None:
        """A step was dispatched. The first one, which compiles, is waited for and belongs to no window."""
        if self.compile_time is not None:
            self._steps += 1
            return
        jax.block_until_ready(outputs)
        now = self.clock()
        self.compile_time = now - self._began - self._waited
        self._began, self._waited, self._fetched = now, 0.0, 0.0

    @contextlib.contextmanager
    def paused(self, outputs: Any = ()) -> Iterator[None]:
        """Around what is no training: evaluation, samples, a blocking save. Waits first for `outputs`, the last step's
        results, so that steps in flight are counted as training."""
        jax.block_until_ready(outputs)
        before, waited = self.clock(), self._waited
        try:
            yield
        finally:
            self._began += self.clock() - before
            self._waited = waited

    def report(self) -> dict[str, float | None]:
        """Ends the window and describes it by metric names (docs/metrics.md). Call it when the last step's results have
        been waited for. Without a step since the last report only memory and, once, the compile time are known."""
        now = self.clock()
        row: dict[str, float | None] = {}
        if self._steps:
            window = (self._steps, max(now - self._began, 1e-9), self._waited)
            self._windows.append(window)
            row |= self._describe(window[1] / window[0], window[2] / window[1])
            self.batch_time = self._fetched / self._steps
            self._began, self._steps, self._waited, self._fetched = now, 0, 0.0, 0.0
        if self.compile_time is not None and not self._told:
            row["perf/compile_time"], self._told = self.compile_time, True
        return row | peak_memory(self.devices)

    def summary(self) -> dict[str, float | None]:
        """The whole run so far: the median over windows of the step time and the speeds that follow from it, the share
        waited over all windows, compile time and memory. Empty of speeds before the first window."""
        row: dict[str, float | None] = {}
        if self._windows:
            seconds = sum(w[1] for w in self._windows)
            row |= self._describe(statistics.median(w[1] / w[0] for w in self._windows),
                                  sum(w[2] for w in self._windows) / seconds)
        if self.compile_time is not None:
            row["perf/compile_time"] = self.compile_time
        return row | peak_memory(self.devices)

    def flops(self, steps: int) -> float | None:
        """Model FLOPs of so many steps (docs/flops.md), None where the model does not tell."""
        if self.flops_per_token is None:
            return None
        return self.passes * self.flops_per_token * self.tokens_per_step * steps

    def _describe(self, step_time: float, data_wait: float) -> dict[str, float | None]:
        speed = self.tokens_per_step / step_time
        return {"perf/step_time": step_time,
                "perf/tokens_per_sec": speed,
                "perf/tokens_per_sec_per_device": speed / len(self.devices),
                "perf/mfu": mfu(speed, self.flops_per_token, self.peak, len(self.devices), self.passes),
                "perf/data_wait": data_wait}
