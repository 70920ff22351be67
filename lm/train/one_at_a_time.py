"""Train steps with large temporary memory on a CPU: one after the other, so that one step's memory serves all.

XLA's CPU backend takes the temporary memory of a step from malloc and gives it back when the step is done, in a thread
of its own and after the results are there. A step that was dispatched before, or that follows at once, asks for its own
before that, and gets other addresses. glibc does not use the first ones again for a request of the same size where
something small took the few bytes around them that aligned memory needs: up to four steps' worth was seen to pile up.
What compiling leaves in the heap, hundreds of MiB, stays beside it.

So a large step is compiled first, what compiling left is given back, and a step is dispatched when the memory of the
last one is free. The host's own work still overlaps with the step before.
"""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from lm.core.sharding import platform

LARGE = 64 << 20  # bytes of temporaries from which a step is large; it takes a hundred times as long as waiting here
GIVEN_BACK = 3  # steps before which freed memory is given back: the first ones leave small things in their way
PAUSE, LIMIT = 1e-4, 0.02  # seconds between two looks at the threads, and in all


class OneAtATime:
    """Calls `step`, a jitted function of (state, batch) that returns (state, metrics): large ones on a CPU one after
    the other, all others as they are. Results do not depend on it, and it is compiled once either way."""

    def __init__(self, step: Callable[[Any, Any], tuple[Any, Any]]):
        self.step = step
        self.large: bool | None = None if platform() == "cpu" and sys.platform.startswith("linux") else False
        self._done, self._steps = None, 0

    def __call__(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """(state after the step, metrics), dispatched and perhaps still being computed."""
        if self.large is None:
            self.large = temporaries(self.step, state, batch) >= LARGE
        if not self.large:
            return self.step(state, batch)
        jax.block_until_ready(self._done)
        if self._steps:
            wait_until_freed()
        if self._steps < GIVEN_BACK:
            give_back()
        state, metrics = self.step(state, batch)
        self._done, self._steps = jax.tree.leaves(metrics)[:1], self._steps + 1
        return state, metrics


def temporaries(step: Any, *arguments: Any) -> int:
    """Bytes of temporary memory of a jitted function, which is compiled; the next call finds it so."""
    analysis = step.lower(*arguments).compile().memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes


def wait_until_freed(limit: float = LIMIT) -> bool:
    """Waits until no thread runs that Python did not start, at most `limit` seconds: XLA's thread frees the memory of a
    step after its results are there, and then sleeps. Returns whether all of them do."""
    end = time.perf_counter() + limit
    own = {thread.native_id for thread in threading.enumerate()}
    while any(map(_runs, {int(name) for name in os.listdir("/proc/self/task")} - own)):
        if time.perf_counter() > end:
            return False
        time.sleep(PAUSE)
    return True


def _runs(thread: int) -> bool:
    """Whether a thread of this process runs, or would if it had a core."""
    try:
        with open(f"/proc/self/task/{thread}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "R"
    except OSError:  # it ended
        return False


def give_back() -> None:
    """Gives memory that is free in the heap back to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
