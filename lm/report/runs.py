"""What a report reads of a run: its config, metrics, result, environment, samples and pictures."""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from lm.train.plots import series
from lm.train.writers import read_rows

SEEDS = ("config.train.seed", "config.data.seed")


class Run(NamedTuple):
    """A workdir. config: full path to value. result: final_result.json, empty where the run has not ended. samples:
    prompt and text of the last time. pictures: name to PNG bytes."""

    name: str
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any]
    environment: Mapping[str, Any]
    samples: str
    pictures: Mapping[str, bytes]


class Group(NamedTuple):
    """Runs whose configs differ in seeds alone."""

    label: str
    runs: Sequence[Run]


def read(workdir: Any, name: str, config: Mapping[str, Any]) -> Run:
    """The run of a workdir, whose flattened config is given."""
    path = epath.Path(workdir)

    def data(file: str) -> Mapping[str, Any]:
        return json.loads((path / file).read_text()) if (path / file).exists() else {}

    samples = sorted((path / "samples").iterdir(), key=lambda p: int(p.stem) if p.stem.isdecimal() else -1) if (
        path / "samples").exists() else []
    plots = sorted((path / "plots").iterdir()) if (path / "plots").exists() else []
    return Run(name, config, read_rows(path), data("final_result.json"), data("environment.json"),
               samples[-1].read_text() if samples else "",
               {p.stem: p.read_bytes() for p in plots if p.suffix == ".png" and p.stem != "loss"})


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Path to the value in each run, None where it has none, of what is not the same in all."""
    paths = dict.fromkeys(path for run in runs for path in run.config)
    found = {path: [run.config.get(path) for run in runs] for path in paths}
    return {path: values for path, values in found.items() if any(value != values[0] for value in values)}


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in seeds alone, together; labelled by what tells the groups apart."""
    apart = [path for path in differing(runs) if path not in SEEDS]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = [f"{path.rpartition('.')[2]}={short(run.config.get(path))}" for path in apart]
        # Runs that differ in very much are told apart by name, but for those with the same settings.
        key = ", ".join(settings)
        groups.setdefault(key, []).append(run)
    few = len(apart) <= 3
    return [Group(key if few and key else members[0].name + (f" and {len(members) - 1} more" if members[1:] else ""),
                  members) for key, members in groups.items()]


def metric_of(runs: Sequence[Run]) -> tuple[str, str]:
    """(metric, unit) in which the runs are compared: bits per byte where all have it, else nats per token."""
    if all(series(run.rows, "train/bits_per_byte")[0] for run in runs):
        return "bits_per_byte", "bits per byte"
    return "loss", "loss (nats per token)"


def spread(values: Sequence[float]) -> str:
    """A number, or mean and standard deviation of several."""
    if len(values) == 1:
        return short(values[0])
    return f"{short(statistics.fmean(values))} ± {statistics.stdev(values):.2g}"


def short(value: Any) -> str:
    """A value in a table."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
