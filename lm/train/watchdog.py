"""Ends a run that hangs, with the stacks of all threads, instead of burning devices over night."""

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from lm.train.exit_codes import HUNG


class Watchdog:
    """Watches for a step that does not finish.

        with Watchdog(options.hang_seconds, workdir, process_index=jax.process_index()) as watchdog:
            for step in ...:
                ...
                watchdog.finished(step)

    It is armed by the first `finished`, so that compilation takes as long as it likes. When nothing was reported for
    `hang_seconds`, the stacks of all threads go to stderr and to <workdir>/hang_<process_index>.txt, and the process
    ends with code 77 at once: cleaning up would wait for what hangs. In a run of many processes each watches itself.

    hang_seconds: None watches nothing. It must be longer than the time between two calls of `finished`: where the loop
    waits for the devices only at log steps, that is the time of all steps between them.
    """

    def __init__(self, hang_seconds: float | None, workdir: epath.PathLike, *, process_index: int = 0):
        if hang_seconds is not None and hang_seconds <= 0:
            raise ValueError(f"hang_seconds={hang_seconds} must be positive, or None to watch nothing")
        self.hang_seconds = hang_seconds
        self.report = epath.Path(workdir) / f"hang_{process_index}.txt"
        self._changed = threading.Condition()
        self._last: float | None = None  # None: not armed
        self._step, self._pauses, self._closed = 0, 0, False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self.hang_seconds is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def finished(self, step: int) -> None:
        """Step number `step` is done; the next one has `hang_seconds` from now."""
        with self._changed:
            armed, self._last, self._step = self._last is not None, time.monotonic(), step
            if not armed:
                self._changed.notify()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what may take long and is no step: evaluation, a checkpoint. The time starts anew after it."""
        with self._changed:
            self._pauses += 1
        try:
            yield
        finally:
            with self._changed:
                self._pauses -= 1
                if self._last is not None:
                    self._last = time.monotonic()
                self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                if self._last is None or self._pauses:
                    self._changed.wait()
                    continue
                left = self._last + self.hang_seconds - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                else:
                    self._end()

    def _end(self) -> None:
        head = (f"no step finished for {self.hang_seconds:g} seconds after step {self._step}: this process "
                f"({os.getpid()}) hangs and ends with code {HUNG}. Stacks of all threads:\n")
        try:
            with tempfile.TemporaryFile("w+") as file:  # faulthandler needs a file of the operating system
                file.write(head)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                text = file.read()
            cursor = "\x1b[?25h" if sys.stderr is not None and sys.stderr.isatty() else ""  # a live line hides it
            os.write(2, f"{cursor}\n{text}".encode())
            # The file system may be what hangs: do not wait for it for ever.
            saving = threading.Thread(target=self._save, args=(text,), daemon=True)
            saving.start()
            saving.join(10.0)
        finally:
            os._exit(HUNG)

    def _save(self, text: str) -> None:
        with contextlib.suppress(Exception):  # the text is on stderr already, and nobody is left to catch this
            self.report.parent.mkdir(parents=True, exist_ok=True)
            self.report.write_text(text)
