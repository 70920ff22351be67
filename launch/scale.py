"""`lm scale`: a ladder of sizes, the laws that their losses follow, and what the next size comes to."""

import argparse
import json
import pathlib
from typing import Any

FLAGS = ("count", "metric", "level", "resamples")
LADDER, RESULTS = "ladder.json", "scale.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm scale`."""
    parser.add_argument("--param", metavar="PATH=VALUES",
                        help="the sizes: PATH=a,b,c, or PATH,PATH=(1,2),(3,4) for fields that vary together")
    parser.add_argument("--next", metavar="VALUES", help="sizes whose loss is predicted, written like those of --param")
    parser.add_argument("--tokens-per-parameter", metavar="R,...", help="train each size on R tokens a parameter")
    parser.add_argument("--flops", metavar="C,...", help="train each size with each of these budgets of training FLOPs")
    parser.add_argument("--seeds", metavar="S,...", help="train each of it with these seeds (default: 0)")
    parser.add_argument("--count", help="what is a parameter: all (default), or body, without embedding and head")
    parser.add_argument("--metric", help="a number of final_result.json (default: eval/validation/loss)")
    parser.add_argument("--level", type=float, help="share of the resampled fits in an interval (default: 0.9)")
    parser.add_argument("--resamples", type=int, help="how often runs are drawn again (default: 300)")
    parser.add_argument("--verify", action="store_true", help="train the next sizes too, and say what was found")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one a core on CPUs, else one)")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and what they cost, and stop")


def main(args: argparse.Namespace) -> int:
    """Runs the command. Exit code 0 where all runs ended well and a law was found, 1 where not, 75 where it was told to
    stop."""
    from launch.config_workdir import check_place
    from launch.scales.ladder import ladder
    if args.config is None:
        raise ValueError("lm scale needs --config FILE.py[:ARG], the experiment whose sizes are trained")
    if args.workdir is None or "://" in args.workdir:
        raise ValueError(f"lm scale needs --workdir DIR, a folder of this machine; got {args.workdir}")
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1; got {args.jobs}")
    definition = defined(args)
    if args.verify and not (definition.next and definition.tokens_per_parameter):
        raise ValueError("--verify trains the sizes of --next at --tokens-per-parameter; give both")
    rungs = ladder(definition, args.config, args.overrides)
    if args.dry_run:
        return show_plan(rungs)
    workdir = pathlib.Path(args.workdir)
    check_place(args.workdir)
    keep(workdir, rungs)
    wanted = [rung for rung in rungs if args.verify or not rung.ahead]
    stopped = train(workdir, wanted, args.jobs)
    if stopped:
        return stopped
    found = result(workdir, definition, rungs)
    publish(workdir, found)
    return 1 if found["failed"] or all("refused" in law for law in found["laws"]) else 0


def defined(args: argparse.Namespace) -> Any:
    """The ladder that the experiment file's `scale()` and the flags ask for."""
    from launch.config_files import experiment_file, experiment_module
    from launch.scales.definition import from_data
    from launch.sweeps.space import parse_text
    path, _ = experiment_file(args.config)
    module = None if path is None else experiment_module(path)
    given = dict(module.scale()) if hasattr(module, "scale") else {}
    if args.param is not None:
        name, equals, values = args.param.partition("=")
        if not equals:
            raise ValueError(f"--param {args.param!r} must be PATH=VALUES, such as model.embed_dim=32,48,64,96")
        given["sizes"] = {name: parse_text(values)}
        given.pop("next", None)  # it is written like the sizes that are replaced
    for name in ("next", "tokens_per_parameter", "flops", "seeds"):
        if getattr(args, name) is not None:
            given[name] = parse_text(getattr(args, name))
    given |= {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    return from_data(given, "the ladder")


def show_plan(rungs: list[Any]) -> int:
    """Prints what would run."""
    print_table("Runs", ("run", "N", "D", "steps", "FLOPs"), [
        [rung.cell.name, f"{rung.params:,}", f"{rung.tokens:,}", str(rung.config.train.steps), f"{rung.flops:.3g}"]
        for rung in rungs])
    ahead = sum(rung.flops for rung in rungs if rung.ahead)
    print(f"{sum(rung.flops for rung in rungs) - ahead:.3g} FLOPs in all, {ahead:.3g} more with --verify")
    return 0


def keep(workdir: pathlib.Path, rungs: list[Any]) -> None:
    """Notes the runs of this ladder. Raises ValueError where the folder holds runs of the same name and another config:
    sizes, seeds and lengths may be added, and what they share may not change."""
    from launch import config as configs
    from lm.claims.store import read_json, write_json
    hashes = {rung.cell.name: configs.config_hash(rung.config) for rung in rungs}
    old = read_json(workdir / LADDER) or {}
    changed = sorted(name for name in hashes if name in old and old[name] != hashes[name])
    if changed:
        raise ValueError(f"{workdir} holds a ladder of another config: {', '.join(changed[:3])} "
                         f"{'differ' if len(changed) > 1 else 'differs'}; give another --workdir")
    write_json(workdir / LADDER, {**old, **hashes})


def train(workdir: pathlib.Path, rungs: list[Any], jobs: int | None) -> int:
    """Trains what has not been trained, each run in a process of its own; returns 75 where it was told to stop."""
    from launch import config as configs
    from launch.claim_grid import run_and_tell
    texts = {rung.cell.name: configs.to_json(rung.config) for rung in rungs}
    return run_and_tell(workdir, [rung.cell for rung in rungs], texts, jobs=jobs, title=f"{len(rungs)} runs")


def result(workdir: pathlib.Path, definition: Any, rungs: list[Any]) -> dict[str, Any]:
    """What `scale.json` holds. Runs of the next sizes are compared with what was predicted, and never fitted."""
    from launch.scales.ladder import ahead_of
    from lm.claims.store import read_cell
    from lm.scaling.analysis import analyse
    from lm.train.exit_codes import PREEMPTED
    runs, failed, later = [], [], []
    for rung in rungs:
        cell = read_cell(workdir, rung.cell.name)
        value = (cell["values"] or {}).get(definition.metric)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            (later if rung.ahead else runs).append((rung.cell.name, rung.run(float(value))))
        elif cell["attempts"] and cell["attempts"][-1]["exit_code"] != PREEMPTED:
            failed.append({"name": rung.cell.name, "error": why(cell, definition.metric)})
    if not runs:
        raise ValueError(f"no run of {workdir} ended with {definition.metric}: "
                         f"{failed[0]['error'] if failed else 'none was trained'}")
    found = analyse([run for _, run in runs], ahead_of(rungs), level=definition.level, resamples=definition.resamples)
    for one in found["predictions"]:
        one["found"] = [run.loss for _, run in later if run.size == one["size"] and run.tokens == one["tokens"]]
    return {"metric": definition.metric, "count": definition.count,
            "runs": [{"name": name, **run._asdict()} for name, run in runs],
            "verified": [{"name": name, **run._asdict()} for name, run in later], "failed": failed, **found}


def why(cell: dict[str, Any], metric: str) -> str:
    """What went wrong with a run."""
    if cell["values"] is not None:
        return f"{metric} is not there; final_result.json has {', '.join(sorted(cell['values']))}"
    last = cell["attempts"][-1]
    return f"exit code {last['exit_code']}: {last.get('message', '')}"


def publish(workdir: pathlib.Path, found: dict[str, Any]) -> None:
    """scale.json, scale.md and scale.png, and the tables on the terminal."""
    from lm.claims.store import write_json
    from lm.scaling.figure import draw
    from lm.scaling.page import tables, to_markdown
    write_json(workdir / RESULTS, found)
    (workdir / "scale.md").write_text(to_markdown(json.loads((workdir / RESULTS).read_text()), "scale.png"))
    (workdir / "scale.png").write_bytes(draw(found))
    for table in tables(found):
        print_table(table.title, table.head, table.rows)
    print(f"{workdir / 'scale.md'}\n{workdir / 'scale.png'}\n{workdir / RESULTS}")


def print_table(title: str, head: Any, rows: Any) -> None:
    """A table on the terminal, a line a row however wide: what is refused says why."""
    from rich.console import Console
    from rich.table import Table
    table = Table(*head, box=None, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=1000, soft_wrap=True, highlight=False, markup=False).print(table)
