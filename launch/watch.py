"""`lm watch`: how runs are going, in the terminal, from what they have logged."""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from lm.train.exit_codes import DONE, HUNG, NONFINITE, PREEMPTED

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40
STATES = {DONE: "done", PREEMPTED: "preempted", NONFINITE: "not finite", HUNG: "hung"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm watch`."""
    parser.add_argument("workdirs", nargs="*", metavar="WORKDIR", help="runs, or folders of runs")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between two looks (default: 5)")
    parser.add_argument("--once", action="store_true", help="look once and end")


def main(args: argparse.Namespace) -> int:
    """Shows a table until Ctrl-C, or until all runs have ended."""
    from rich.console import Console
    from rich.live import Live

    from launch.report import runs_in
    if args.every <= 0:
        raise ValueError(f"--every={args.every} must be above 0")
    places = [place for given in (args.workdirs or filter(None, [args.workdir])) for place in runs_in(given)]
    if not places:
        raise ValueError("lm watch needs WORKDIR..., runs or folders of runs")
    console = Console(highlight=False)
    if args.once or not console.is_terminal:
        console.print(table([look(place) for place in places]))
        return 0
    with Live(console=console, auto_refresh=False) as live:
        while True:
            rows = [look(place) for place in places]
            live.update(table(rows), refresh=True)
            if all(row["ended"] for row in rows):
                return 0
            time.sleep(args.every)


def look(place: str) -> dict[str, Any]:
    """What a run is doing: step of how many, losses, speed, and seconds since it last wrote."""
    from lm.train.plots import series
    from lm.train.writers import read_rows
    path = epath.Path(place)
    steps = json.loads((path / "config.json").read_text()).get("train", {}).get("steps")
    rows = read_rows(path)
    result = json.loads((path / "final_result.json").read_text()) if (path / "final_result.json").exists() else {}
    metric = "bits_per_byte" if series(rows, "train/bits_per_byte")[0] else "loss"
    at, losses = series(rows, f"train/{metric}")
    _, speeds = series(rows, "perf/tokens_per_sec")
    file = path / "metrics.jsonl"
    # A run that was stopped and goes on keeps the result of before until it ends.
    ended = bool(result) and (not at or result.get("step", 0) >= at[-1])
    code = result.get("exit_code")
    return {"name": place, "step": at[-1] if at else 0, "steps": steps, "metric": metric, "losses": losses,
            "evaluations": last_evaluations(rows, metric), "speed": speeds[-1] if speeds else None,
            "quiet": max(time.time() - file.stat().mtime, 0.0) if file.exists() else None,
            "ended": STATES.get(code, f"exit code {code}") if ended else None}


def last_evaluations(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The last value of each evaluation set."""
    found = {name.split("/", 1)[1].rsplit("/", 1)[0]: row[name] for row in rows for name in row
             if name.startswith("eval/") and name.endswith("/" + metric)}
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, (int, float)))


def table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The looks as a table."""
    from rich.table import Table
    out = Table(*("run", "step", "training", "", "evaluation", "tokens/s", ""), box=None)
    for row in rows:
        losses = row["losses"]
        state = row["ended"] or ("not begun" if row["quiet"] is None else f"{row['quiet']:.0f} s ago")
        out.add_row(row["name"], f"{row['step']}/{row['steps'] or '?'}",
                    f"{losses[-1]:.4g} {row['metric'].replace('_', ' ')}" if losses else "", spark(losses),
                    row["evaluations"], "" if row["speed"] is None else f"{row['speed']:,.0f}", state)
    return out


def spark(values: Sequence[float]) -> str:
    """A line of bars: means over stretches, without the first twentieth, which falls from the start."""
    values = values[len(values) // 20:]
    if len(values) < 2:
        return ""
    count = min(WIDTH, len(values))
    means = [sum(part) / len(part) for n in range(count)
             if (part := values[n * len(values) // count:(n + 1) * len(values) // count])]
    low, high = min(means), max(means)
    return "".join(BARS[round((mean - low) / (high - low or 1) * (len(BARS) - 1))] for mean in means)
