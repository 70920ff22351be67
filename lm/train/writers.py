"""Where numbers go: metrics.jsonl always, TensorBoard and Weights & Biases when asked.

A row of metrics.jsonl is one JSON object with "step", the number of finished optimizer steps, and scalars by name. NaN
and infinities are the strings "NaN", "Infinity" and "-Infinity": valid JSON that Python's `float` reads back. null is a
value that is not known (MFU of an unknown device). Rows have left this process when `write` returns, so a kill loses
none. Object stores (gs://) cannot append: rows are kept in memory and the whole file is written anew now and then.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath

from lm.train.options import LogOptions

FILE = "metrics.jsonl"
QUEUE = 10_000  # events that may wait for the disk: more than a row has


def to_float(name: str, value: Any) -> float | None:
    """A Python float, or None. Raises ValueError naming the metric where `value` is no scalar."""
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric {name!r} must be a scalar or None; got {type(value).__name__} of shape "
                         f"{getattr(value, 'shape', '()')}") from error


def encode(step: int, scalars: Mapping[str, float | None]) -> str:
    """One row as valid JSON, without the newline."""
    spell = {math.inf: "Infinity", -math.inf: "-Infinity"}
    plain = {k: "NaN" if v is not None and math.isnan(v) else spell.get(v, v) for k, v in scalars.items()}
    return json.dumps({"step": step, **plain}, allow_nan=False)


def decode(line: str) -> dict[str, Any]:
    """The row of a line, numbers as floats. Raises ValueError where the line is not a whole row."""
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(f"not a row of metrics: {line[:80]!r}")
    return {k: float(v) if isinstance(v, str) else v for k, v in row.items()}


def read_rows(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """All rows of a workdir in the order written. Lines that are not rows (a process was killed in the middle of one)
    are left out. No file is no rows."""
    path = epath.Path(workdir) / FILE
    return [row for _, row in _whole_rows(path)]


def _whole_rows(path: epath.Path) -> list[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return []
    rows, broken = [], 0
    for line in path.read_text().split("\n"):
        try:
            rows.append((line, decode(line)))
        except ValueError:
            broken += bool(line.strip())
    if broken:
        logging.warning("%s: %d broken line(s) left out", path, broken)
    return rows


class AppendedFile:
    """Lines of a local file. Lines of steps after `last_step`, and broken ones, are dropped at the start: the file is
    replaced in one move, so that a kill leaves the old one or the new one."""

    def __init__(self, path: epath.Path, last_step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = "".join(line + "\n" for line, row in _whole_rows(path) if row["step"] <= last_step)
        if path.exists() and path.read_text() != kept:
            beside = f"{path}.{os.getpid()}.tmp"
            with open(beside, "w") as file:
                file.write(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - closed by close()
        self._failed = False

    def append(self, line: str) -> None:
        """Adds a line and hands it to the operating system, so that it outlives this process."""
        self._failed = True
        self._file.write(line + "\n")
        self._failed = False

    def flush(self) -> None:
        """Nothing is waiting here."""

    def close(self) -> None:
        """Closes the file. What could not be written has been told by `append`."""
        with contextlib.suppress(OSError) if self._failed else contextlib.nullcontext():
            self._file.close()


class RewrittenFile:
    """The same for stores that only write whole objects: the file is written anew at most every `seconds`, and so
    seldom that it takes no more than a twentieth of the time; what is younger is lost in a kill. A store that fails is
    tried again later, and raises only from `close`."""

    def __init__(self, path: epath.Path, last_step: int, seconds: float = 15.0):
        self.path, self.seconds = path, seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = [line for line, row in _whole_rows(path) if row["step"] <= last_step]
        self._due, self._changed = 0.0, path.exists()

    def append(self, line: str) -> None:
        """Adds a line, and writes the file when it is time."""
        self._lines.append(line)
        self._changed = True
        if time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Writes the file now; a store that fails gets another chance later."""
        if not self._changed:
            return
        began = time.monotonic()
        try:
            self._save()
        except Exception as error:  # any error of any store: numbers are not worth a training run
            logging.warning("could not write %s (%s: %s); will try again", self.path, type(error).__name__, error)
        now = time.monotonic()
        self._due = now + max(self.seconds, 20 * (now - began))

    def _save(self) -> None:
        self.path.write_text("".join(line + "\n" for line in self._lines))
        self._changed = False

    def close(self) -> None:
        """Writes what is not written yet."""
        if self._changed:
            self._save()


class MetricsWriter:
    """Writes scalars of a step to every place that `options` names. Only process 0 writes; elsewhere calls do nothing.

    start_step: finished steps of the state that the run goes on from (0 for a new one). Rows of later steps, which a
    killed run left, are dropped from metrics.jsonl and hidden in TensorBoard. config: what a tracker shows beside the
    run. Raises ValueError where an asked tracker is not installed.
    """

    def __init__(self, workdir: epath.PathLike, options: LogOptions, *, process_index: int = 0, start_step: int = 0,
                 config: Mapping[str, Any] | None = None):
        self._file = self._board = self._wandb = None
        if process_index != 0:
            return
        root = epath.Path(workdir)
        remote = "://" in os.fspath(root)
        if options.wandb_project is not None:  # first: it can fail, and nothing has been changed yet
            self._wandb = open_wandb(root, options.wandb_project, remote, config)
        self._file = (RewrittenFile if remote else AppendedFile)(root / FILE, start_step)
        if options.tensorboard:
            self._board = open_tensorboard(root / "tensorboard", start_step)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """One row. Values are numbers or scalar arrays (those are waited for), or None for what is not known."""
        if self._file is None:
            return
        row = {name: to_float(name, value) for name, value in scalars.items()}
        self._file.append(encode(int(step), row))
        known = {name: value for name, value in row.items() if value is not None}
        if self._board is not None:
            for name, value in known.items():
                if not is_writing(self._board):
                    logging.warning("TensorBoard's event file could not be written; no more events")
                    self._board = None
                    break
                self._board.add_scalar(name, value, int(step))
        if self._wandb is not None:
            self._wandb.log({"step": int(step), **known})

    def flush(self) -> None:
        """Rows so far are where they will be read, as far as the place takes them now."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Writes what is buffered and closes everything; more calls do nothing."""
        file, board, run = self._file, self._board, self._wandb
        self._file = self._board = self._wandb = None
        if file is not None:
            file.close()
        if board is not None and is_writing(board):
            try:
                board.close()
            except OSError as error:
                logging.warning("TensorBoard's event file could not be written: %s", error)
        if run is not None:
            run.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


def is_writing(board: Any) -> bool:
    """Whether tensorboardX's thread lives: a full disk ends it, and the queue to it would then fill up and block."""
    thread = getattr(getattr(getattr(board, "file_writer", None), "event_writer", None), "_worker", None)
    return thread is None or thread.is_alive()


def open_tensorboard(folder: epath.Path, start_step: int) -> Any:
    """An event file in `folder` that hides events after `start_step` of earlier files, as TensorBoard reads them."""
    from tensorboardX import SummaryWriter  # here, since only process 0 and only those who ask need it
    purge = start_step + 1 if folder.exists() and any(folder.iterdir()) else None
    try:
        return SummaryWriter(logdir=os.fspath(folder), purge_step=purge, flush_secs=30, max_queue=QUEUE)
    except ImportError as error:
        raise ValueError(f"config.log.tensorboard=True cannot write to {os.fspath(folder)}: {error}. Install it, or "
                         f"set config.log.tensorboard=False") from error


def open_wandb(root: epath.Path, project: str, remote: bool, config: Mapping[str, Any] | None) -> Any:
    """A run of Weights & Biases that a resumed workdir continues: its id is kept in <workdir>/wandb_run_id. Curves are
    drawn over "step". Without network set WANDB_MODE=offline and run `wandb sync` later."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"config.log.wandb_project={project!r} needs the package wandb: install it with "
                         f"`pip install 'loomlm[wandb]'`, or set config.log.wandb_project=None") from error
    root.mkdir(parents=True, exist_ok=True)
    remembered = root / "wandb_run_id"
    if not remembered.exists():
        remembered.write_text(os.urandom(4).hex())
    run = wandb.init(project=project, id=remembered.read_text().strip(), name=root.name, resume="allow",
                     dir=None if remote else os.fspath(root), config=None if config is None else dict(config))
    run.define_metric("*", step_metric="step")
    return run
