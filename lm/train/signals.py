"""SIGTERM and SIGINT ask a run to save and stop; all processes of a run stop at the same step."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np
from absl import logging

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """Turns SIGTERM (a preempted machine, `scancel`) and SIGINT (Ctrl-C) into a question the loop asks after each step.

        with Preemption(every=options.log.every) as preemption:
            for step in ...:
                ...
                if preemption.agreed(step):
                    save(step); break

    A second SIGINT raises KeyboardInterrupt, for those who do not want to wait. The handlers that were there before
    come back at the end of the block. Only the main thread of a process may set handlers; elsewhere a warning says that
    signals are not seen.

    every: in runs of several processes they talk at each step divisible by it. A signal then takes up to `every` steps:
    that must fit into the grace time (Slurm and GKE: 30 s unless configured). A run of one process stops at once.
    """

    def __init__(self, every: int = 1):
        if every < 1:
            raise ValueError(f"every={every} must be at least 1")
        self.every = every
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is not threading.main_thread():
            logging.warning("not on the main thread: SIGTERM and Ctrl-C will not save a checkpoint")
            return self
        for which in SIGNALS:
            self._before[which] = signal.signal(which, self._handle)
        return self

    def __exit__(self, *exc: Any) -> None:
        while self._before:
            which, handler = self._before.popitem()
            # None: it was not set from Python, as with the one that jax.distributed sets. It cannot be given back.
            signal.signal(which, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        again = "; once more ends it without saving" if number == signal.SIGINT else ""
        # os.write: a handler may run in the middle of a print, which is not reentrant. stderr may be closed.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{self.received.name} received: saving after this step, then stopping{again}\n".encode())

    def agreed(self, step: int) -> bool:
        """Whether to save and stop after `step` finished steps: the same answer in all processes, if all ask at the
        same steps. With several processes this waits, at steps divisible by `every`, for the devices to finish."""
        if jax.process_count() == 1:
            return self.received is not None
        if step % self.every:
            return False
        from jax.experimental import multihost_utils
        return bool(np.any(multihost_utils.process_allgather(np.int32(self.received is not None))))
