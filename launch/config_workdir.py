"""A workdir belongs to one config: another one is refused, but for fields that do not change what is learned."""

import fnmatch
import logging
import os
import secrets
import threading
from collections.abc import Callable
from typing import Any

from etils import epath

from launch.config_files import CONFIG_FILE, config_hash, diff, from_json, to_json
from lm.core.whole_file import write_text

log = logging.getLogger(__name__)

ANSWER_SECONDS = 60.0  # a bucket that has not answered by then will not

# Fields that may change between two starts of one run, and why. `train.steps` may besides only grow.
MAY_CHANGE = (
    ("config.log.*", "only what is written down"),
    ("config.checkpoint.*", "only when the run is saved and what is kept"),
    ("config.eval.*", "only what is measured"),
    ("config.mesh.*", "sums are rounded in another order, nothing else"),
    ("config.model.scan", "the same parameters and sums, compiled another way"),
    ("config.model.remat", "the same values, computed again or kept"),
    ("config.model.*.implementation", "the same function by another kernel, rounded its own way"),
    ("config.data.num_threads", "batches are a function of seed and step, whoever makes them"),
    ("config.data.num_workers", "batches are a function of seed and step, whoever makes them"),
    ("config.data.prefetch", "batches are a function of seed and step, whoever makes them"),
    ("config.train.hang_seconds", "only when a run that hangs is ended"),
    ("config.train.steps", "a run may be made longer; schedules that end with the run are stretched from here on"),
)


def check_place(workdir: str) -> None:
    """Raises ValueError for what cannot be a workdir: nothing, a file, or a bucket whose client is not installed."""
    if not workdir.strip():
        raise ValueError("--workdir is empty; give the folder of the run, local or gs://")
    path = epath.Path(workdir)
    places = (path,) if "://" in workdir else (path, *path.parents)  # buckets have no folders that could be files
    look = lambda: next((place for place in places if place.exists() and not place.is_dir()), None)
    try:
        file = in_time(look) if "://" in workdir else look()
    except ImportError as error:
        raise ValueError(f"--workdir {workdir}: {error}; pip install gcsfs (gs://) or s3fs (s3://)") from None
    except Exception as error:
        if isinstance(error, OSError) or "://" in workdir:
            raise ValueError(f"--workdir {workdir} cannot be read: {_line(error)}{_remedy(workdir)}") from error
        raise
    if file is not None:
        raise ValueError(f"--workdir {workdir}: {file} is a file; give a folder, which may be new")


def check_writable(workdir: str) -> None:
    """Raises ValueError where nothing can be written at `workdir`, before anything is compiled: a small file is written
    there, or for a new folder beside it, and removed."""
    path = epath.Path(workdir)
    places = [path]
    if "://" not in workdir:
        places = [place for place in (path, path / "checkpoints") if place.exists()] or [
            next(place for place in path.absolute().parents if place.exists())]
    for place in places:
        probe = place / f".probe-{secrets.token_hex(4)}"

        def write(probe: epath.Path = probe) -> None:
            probe.write_text("")
            probe.unlink(missing_ok=True)
        try:
            in_time(write) if "://" in workdir else write()
        except Exception as error:
            raise ValueError(f"--workdir {workdir}: {place} cannot be written: {_line(error)}{_remedy(workdir)}"
                             ) from error
        if "://" not in workdir and not os.access(place, os.R_OK | os.X_OK, effective_ids=True):
            raise ValueError(f"--workdir {workdir}: {place} cannot be read{_remedy(workdir)}")


def in_time(ask: Callable[[], Any], seconds: float | None = None) -> Any:
    """What `ask` returns. Raises what it raises, and TimeoutError where it is not back in time: clients of object
    stores ask again for minutes where nobody answers."""
    seconds = ANSWER_SECONDS if seconds is None else seconds
    came: list[tuple[Any, BaseException | None]] = []

    def call() -> None:
        try:
            came.append((ask(), None))
        except BaseException as error:
            came.append((None, error))
    asking = threading.Thread(target=call, daemon=True)
    asking.start()
    asking.join(seconds)
    if not came:
        raise TimeoutError(f"no answer within {seconds:g} s")
    if came[0][1] is not None:
        raise came[0][1]
    return came[0][0]


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _remedy(workdir: str) -> str:
    if "://" not in workdir:
        return "; see to its owner and permissions, or use another folder"
    return ("; see to the name of the bucket, that this machine reaches it, and that its account may read and write "
            "there (gcloud auth application-default login, or the service account of the machine)")


def why_allowed(path: str, before: Any, now: Any) -> str | None:
    """Why this difference may stand in one workdir, or None where it may not."""
    if path == "config.train.steps" and not (isinstance(before, int) and isinstance(now, int) and now >= before):
        return None
    return next((why for pattern, why in MAY_CHANGE if fnmatch.fnmatchcase(path, pattern)), None)


def check_workdir(workdir: Any, config: Any, *, allow_change: bool = False, write: bool = True) -> None:
    """Sees that `workdir` belongs to the resolved `config`, and writes its config.json.

    workdir: local or `gs://`; it may be new. allow_change: go on with the new config whatever differs. write: False in
    every process but the first. Raises ValueError with a table of what differs where the workdir was made by a config
    that learns something else (`MAY_CHANGE` lists what may differ; each such difference is logged).
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if path.exists():
        old = _completed(from_json(path.read_text()))
        changes = diff(old, config)
        refused = [change for change in changes if why_allowed(*change) is None]
        if refused and not allow_change:
            raise ValueError(
                f"{workdir} was made by a different config ({config_hash(old)}, now {config_hash(config)}):\n"
                f"{table(refused, 'workdir', 'now')}\n"
                f"Use another --workdir, or go on with the new config: --allow-config-change")
        for name, before, now in changes:
            why = why_allowed(name, before, now) or "allowed by --allow-config-change"
            log.info("config of the workdir changed: %s from %r to %r (%s)", name, before, now, why)
        if not changes:
            return
    if write:
        write_text(path, to_json(config))


def _completed(old: dict[str, Any]) -> Any:
    """The stored config with the defaults of fields that were added since, where it still resolves."""
    from launch.config import resolve
    try:
        return resolve(old)
    except ValueError:
        return old


def table(changes: list[tuple[str, Any, Any]], left: str, right: str) -> str:
    """Rows of (path, a, b) as aligned text with a heading."""
    rows = [("field", left, right), *((path, repr(a), repr(b)) for path, a, b in changes)]
    widths = [max(len(row[n]) for row in rows) for n in range(2)]
    return "\n".join(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)
