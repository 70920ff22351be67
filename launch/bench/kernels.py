"""`lm bench kernels`: the forms that CPUs run against what one would install instead, turn by turn, at equal work.

Both sides are processes that hold the same weights and inputs; the results and all gradients have to agree first. They
take turns on the same cores, torch with its best of one and of all threads. A package that is not installed is skipped,
and the table says so.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import statistics
import tempfile
import time
from typing import Any, NamedTuple

from launch.bench.publish import publish
from launch.bench.train import side

TURN = 3
DIRECTIONS = ("forward", "both")


class Comparison(NamedTuple):
    """module: of a side, with `describe(*options)`. package: the import that it needs; distribution: what to install.
    options: more arguments of a side. forms: the other side's own, of which its fastest counts; the last argument."""
    name: str
    module: str
    package: str
    distribution: str
    options: tuple[str, ...] = ()
    forms: tuple[str, ...] = ("",)


COMPARISONS = (Comparison("min_gru", "launch.bench.min_gru", "minGRU_pytorch", "minGRU-pytorch"),
               *(Comparison("peer", "launch.bench.peer", "PEER_pytorch", "PEER-pytorch", (str(experts),),
                            ("whole", "chunked"))
                 for experts in (65_536, 262_144)))


def run(args: argparse.Namespace) -> int:
    """Measures every comparison that can be, prints and writes the table."""
    if args.steps < 10:
        raise ValueError(f"--steps must be at least 10, for a median that means something; got {args.steps}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    cores = len(os.sched_getaffinity(0))
    result = {"when": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "cores": cores,
              "load": os.getloadavg()[0], "steps": args.steps,
              "rows": [row for comparison in COMPARISONS for row in measure(comparison, args.steps, cores)]}
    return publish(args.out, "kernels", result, markdown(result))


def missing(comparison: Comparison) -> str | None:
    """Why it cannot be measured here, or None."""
    for package, install in (("torch", "torch"), (comparison.package, comparison.distribution)):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install {install}"
    return None


def measure(comparison: Comparison, steps: int, cores: int) -> list[dict[str, Any]]:
    """One row a direction, or one that says why there is none."""
    reason = missing(comparison)
    if reason:
        return [dict(name=comparison.name, skipped=reason)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights.npz")
        for direction in DIRECTIONS:
            opened = lambda who, threads, form, direction=direction: side(
                comparison.module, who, direction, str(threads), path, *comparison.options, form)
            trials = {}
            for threads, form in itertools.product(sorted({1, cores}), comparison.forms):
                with opened("torch", threads, form) as torch:
                    torch.ask("warm 1")
                    trials[threads, form] = statistics.median(torch.ask("time 5")["seconds"])
            threads, form = min(trials, key=trials.get)
            seconds: dict[str, list[float]] = {"torch": [], "ours": []}
            with opened("torch", threads, form) as torch, opened("ours", 0, "") as ours:
                while len(seconds["ours"]) < steps:
                    for name, one in (("torch", torch), ("ours", ours)):
                        one.ask("warm 1")      # takes back the caches that the other side had
                        seconds[name] += one.ask(f"time {TURN}")["seconds"]
                versions = [f"{comparison.distribution} {importlib.metadata.version(comparison.distribution)}",
                            torch.ask("report")["version"], ours.ask("report")["version"]]
            rows.append(dict(name=comparison.name, direction=direction, threads=threads, form=form, seconds=seconds,
                             description=importlib.import_module(comparison.module).describe(*comparison.options),
                             versions=versions,
                             trials={f"{t} {f}".strip(): s for (t, f), s in trials.items()},
                             ratio=statistics.median(seconds["torch"]) / statistics.median(seconds["ours"])))
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    lines = [f"Medians of at least {result['steps']} calls of each side, in turns of {TURN}, {result['cores']} CPU "
             f"cores, load average {result['load']:.1f} at the start, Python {result['python']}.", "",
             "| what | direction | torch's threads, form | torch, ms | ours, ms | speed |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        if "skipped" in row:
            lines.append(f"| {row['name']} | | | | | not measured: {row['skipped']} |")
            continue
        torch, ours = (1e3 * statistics.median(row["seconds"][name]) for name in ("torch", "ours"))
        direction = "forward + backward" if row["direction"] == "both" else row["direction"]
        lines.append(f"| {row['description']}, against {', '.join(row['versions'])} | {direction} | "
                     f"{', '.join(filter(None, (str(row['threads']), row['form'])))} | "
                     f"{torch:.1f} | {ours:.1f} | {row['ratio']:.2f}x |")
    return "\n".join(lines) + "\n"
