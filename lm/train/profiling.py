"""`--profile START:END`: a trace of some steps, for xprof (`xprof <workdir>/profile`) or TensorBoard's profile page."""

import contextlib
import pathlib
import re
import tempfile
from typing import Any

import jax
from absl import logging
from etils import epath


def parse_range(text: str, total_steps: int | None = None) -> tuple[int, int]:
    """START:END as two step numbers, 0 <= START < END, and START below `total_steps` where that is given. Raises
    ValueError that says what is wrong."""
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if found is None:
        raise ValueError(f"--profile {text!r} must be START:END, two step numbers such as 10:15")
    start, end = int(found[1]), int(found[2])
    if start >= end:
        raise ValueError(f"--profile {text!r}: START must be less than END; 10:15 traces five steps after the tenth")
    if total_steps is not None and start >= total_steps:
        raise ValueError(f"--profile {text!r} is never reached in a run of {total_steps} steps; use a START below that")
    return start, end


class Profiler:
    """Traces the steps from when START steps are finished until END steps are finished.

        with Profiler(args.profile, workdir, total_steps=steps) as profiler:
            profiler.at(first_step)
            for step in range(first_step + 1, steps + 1):
                with profiler.step(step):
                    state, metrics = train_step(state, batch)
                profiler.at(step, metrics)

    spec: "START:END", or None for nothing. The trace goes to <workdir>/profile/plugins/profile/<date>/, one file a
    host. A run that resumes inside of the range traces the rest of it; one that ends inside of it keeps what it has.
    START of 0 traces the compilation too, which makes a large trace.
    """

    def __init__(self, spec: str | None, workdir: epath.PathLike, *, total_steps: int | None = None):
        self.range = None if spec is None else parse_range(spec, total_steps)
        self.folder = epath.Path(workdir) / "profile"
        self.tracing = False
        self._local: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def step(self, step: int) -> contextlib.AbstractContextManager:
        """Around the step that will be the `step`-th finished one: names it in the trace, so that xprof can tell step
        times. Costs nothing outside of the range."""
        if not self.tracing:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def at(self, step: int, outputs: Any = ()) -> None:
        """At every boundary, when `step` steps are dispatched: starts or ends the trace where it is time. Waits for
        `outputs`, the results of the last step, only where it does, so that the trace holds whole steps."""
        if self.range is None:
            return
        start, end = self.range
        if not self.tracing and start <= step < end:
            jax.block_until_ready(outputs)
            self._start()
        elif self.tracing and step >= end:
            jax.block_until_ready(outputs)
            self.close()

    def _start(self) -> None:
        # The profiler writes with its own file system, which knows only local paths: copy afterwards.
        if "://" in str(self.folder):
            self._local = tempfile.TemporaryDirectory()
        jax.profiler.start_trace(self._local.name if self._local else str(self.folder))
        self.tracing = True

    def close(self) -> None:
        """Ends a trace that is still running and writes it."""
        if not self.tracing:
            return
        self.tracing = False
        jax.profiler.stop_trace()
        if self._local is not None:
            copy_files(pathlib.Path(self._local.name), self.folder)
            self._local.cleanup()
            self._local = None
        logging.info("profile written to %s", self.folder)


def copy_files(source: pathlib.Path, target: epath.Path) -> None:
    """Copies all files below a local folder to the same places below `target`."""
    for path in source.rglob("*"):
        if path.is_file():
            place = target / path.relative_to(source).as_posix()
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
