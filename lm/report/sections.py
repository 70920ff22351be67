"""What a report says of runs and of a sweep, as sections of a page."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm.report.figures import bars, curves, parallel_coordinates
from lm.report.page import Picture, Section, Table, Verbatim
from lm.report.runs import SEEDS, Group, Run, differing, grouped, metric_of, short, spread

SPEED = {"perf/tokens_per_sec": "tokens/s", "perf/step_time": "s a step", "perf/mfu": "MFU",
         "perf/data_wait": "waiting for data", "perf/compile_time": "compilation, s",
         "perf/peak_device_memory_gib": "device GiB", "perf/peak_host_memory_gib": "host GiB", "train/flops": "FLOPs"}


class Trials(NamedTuple):
    """A sweep's: (settings, objective) of those that ended, rows of all of them for a table, shares of importance, and
    the objective with whether more of it is better."""

    ended: Sequence[tuple[Mapping[str, Any], float]]
    table: Table
    importance: Mapping[str, float]
    objective: str
    more: bool


def of_runs(runs: Sequence[Run]) -> list[Section]:
    """Curves, evaluations, what differs in the configs, speed, further pictures, samples, environments."""
    groups = grouped(runs)
    metric, unit = metric_of(runs)
    sections = [Section("Loss", _curves(groups, metric, unit)), Section("Results", [_results(groups)])]
    apart = differing(runs)
    if apart:
        sections.append(Section("Configs", [
            "What differs between the runs.", Table(["field", *(run.name for run in runs)], [
                [path.removeprefix("config."), *map(short, values)] for path, values in apart.items()])]))
    sections.append(Section("Speed", [Table(["run", *SPEED.values()], [
        [run.name, *(short(run.result.get(name)) for name in SPEED)] for run in runs])]))
    pictures = [Picture(png, f"{name} of {run.name}") for run in runs for name, png in run.pictures.items()]
    if pictures:
        sections.append(Section("Plots", [block for p in pictures for block in (p.alt, p)]))
    if any(run.samples for run in runs):
        sections.append(Section("Samples", [block for run in runs if run.samples
                                            for block in (run.name, Verbatim(run.samples))]))
    return [*sections, Section("Environment", [_environments(runs)])]


def of_trials(trials: Trials) -> list[Section]:
    """Parallel coordinates, importance, and the table of a sweep."""
    blocks: list[Any] = []
    picture = parallel_coordinates(trials.ended, trials.objective, more=trials.more)
    if picture is not None:
        blocks.append(Picture(picture, f"settings of the trials and {trials.objective}"))
    if trials.importance:
        blocks.append(Picture(bars(trials.importance, f"importance for {trials.objective} (PED-ANOVA)"),
                              "importance of the settings"))
    return [Section("Sweep", [*blocks, trials.table])]


def _curves(groups: Sequence[Group], metric: str, unit: str) -> list[Any]:
    names = dict.fromkeys(name for group in groups for run in group.runs for row in run.rows for name in row)
    sets = [name.split("/", 1)[1].rsplit("/", 1)[0] for name in names
            if name.startswith("eval/") and name.endswith("/" + metric)]
    out = []
    for evaluation in (None, *sets):
        png = curves(groups, metric, unit, evaluation=evaluation)
        if png is not None:
            out.append(Picture(png, f"{unit} by step, {evaluation or 'training'}"))
    seeds = max(len(group.runs) for group in groups)
    if seeds > 1:
        out.append("Lines are means over runs that differ in seeds alone; bands go from the least to the largest.")
    return out or ["No loss was logged yet."]


def _results(groups: Sequence[Group]) -> Table:
    names = dict.fromkeys(name for group in groups for run in group.runs for name in run.result
                          if name.startswith(("eval/", "baseline/")))
    rows = []
    for group in groups:
        row = [group.label or group.runs[0].name, str(len(group.runs)),
               ", ".join(dict.fromkeys(_state(run) for run in group.runs))]
        for name in names:
            values = [value for run in group.runs if isinstance(value := run.result.get(name), (int, float))]
            row.append(spread(values) if values else "")
        rows.append(row)
    return Table(["setting", "runs", "state", *names], rows)


def _state(run: Run) -> str:
    if not run.result:
        return f"at step {run.rows[-1]['step']}" if run.rows else "not begun"
    return {0: "done", 75: "preempted", 76: "not finite", 77: "hung"}.get(run.result.get("exit_code"), "ended")


def _environments(runs: Sequence[Run]) -> Table:
    def cells(run: Run) -> list[str]:
        env = run.environment
        git = (env.get("git") or {}).get("experiment") or (env.get("git") or {}).get("project") or {}
        device, packages = env.get("devices") or {}, env.get("packages") or {}
        return [run.name, " ".join(map(str, env.get("command", ()))),
                f"{str(git.get('revision', ''))[:10]}{' with changes' if git.get('dirty') else ''}",
                f"{device.get('count', '')} x {device.get('kind', '')}", f"{env.get('python', '')}",
                *(packages.get(name, "") for name in ("jax", "flax", "loomlm")),
                ", ".join(short(run.config.get(path)) for path in SEEDS if path in run.config)]
    return Table(["run", "command", "revision", "devices", "Python", "jax", "flax", "loomlm", "seed"],
                 [cells(run) for run in runs])
