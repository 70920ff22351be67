"""A workdir belongs to one config: another one is refused, but for fields that do not change what is learned."""

import fnmatch
import logging
from typing import Any

from etils import epath

from launch.config_files import CONFIG_FILE, config_hash, diff, from_json, to_json
from lm.core.whole_file import write_text

log = logging.getLogger(__name__)

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
    try:
        file = next((place for place in places if place.exists() and not place.is_dir()), None)
    except ImportError as error:
        raise ValueError(f"--workdir {workdir}: {error}; pip install gcsfs (gs://) or s3fs (s3://)") from None
    if file is not None:
        raise ValueError(f"--workdir {workdir}: {file} is a file; give a folder, which may be new")


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
