"""`lm claim`: runs the grid of small experiments behind a claim, and says PASS or FAIL with the numbers."""

import argparse
import pathlib
import platform
import secrets
import time
from typing import Any

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "experiments" / "claims"
RECORDS = FOLDER / "results"
PAGE = FOLDER.parent.parent / "docs" / "claims.md"
FIGURES = PAGE.parent / "figures" / "claims"
# What recording a run changes is no change of what ran.
MADE_FROM_RESULTS = ("experiments/claims/results", "docs/claims.md", "docs/figures/claims")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `lm claim`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="a claim of experiments/claims, or a file FILE.py")
    parser.add_argument("--list", action="store_true", help="list the claims")
    parser.add_argument("--full", action="store_true", help="the long grid, whose verdict counts where there is one")
    parser.add_argument("--jobs", type=int, metavar="N", help="cells at a time (default: one a core on CPUs, else one)")
    parser.add_argument("--record", action="store_true",
                        help="keep the results in experiments/claims/results, which docs/claims.md is made from")
    parser.add_argument("--judge-again", action="store_true",
                        help="judge what is recorded by the check as it is now; verdicts that change are kept as "
                             "earlier ones")
    parser.add_argument("--page", action="store_true",
                        help="write docs/claims.md and its figures from what is recorded")


def main(args: argparse.Namespace) -> int:
    """Runs the command. Exit code 0 for PASS, 1 for FAIL, 75 where the grid was told to stop before its end."""
    from lm.claims.definition import names, read
    if args.config is not None or args.overrides:
        raise ValueError("lm claim takes no --config: the settings of a claim are its file, "
                         "experiments/claims/NAME.py; copy it to change them, and give the copy as FILE.py")
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1; got {args.jobs}")
    if args.list or args.page:
        if args.name is not None:
            raise ValueError(f"--list and --page are about all claims; leave out {args.name!r}")
        claims = [read(name, FOLDER) for name in names(FOLDER)]
        return list_claims(claims) if args.list else write_page(claims)
    if args.name is None:
        raise ValueError(f"lm claim needs a NAME: {', '.join(names(FOLDER))}; `lm claim --list` says what they claim")
    claim = read(args.name, FOLDER)
    return judge_again(claim) if args.judge_again else run(claim, args)


def judge_again(claim: Any) -> int:
    """The recorded runs of a claim under a check that was mended; what was said before stays beside the new verdict."""
    from lm.claims.store import read_json, write_json
    from lm.claims.verdict import judge, line
    path = RECORDS / f"{claim.name}.json"
    record = read_json(path)
    if record is None:
        raise ValueError(f"--judge-again: no run of {claim.name} is recorded; `lm claim {claim.name} --record` does")
    for one in record["runs"]:
        old, new = one["verdict"], judge(claim.module.check, one["cells"])
        same = [c["what"] for c in old["criteria"]] == [c["what"] for c in new["criteria"]]
        if same and old["passed"] == new["passed"]:
            continue
        one["earlier"] = [*one.get("earlier", ()), {key: old[key] for key in ("passed", "reason", "criteria")}]
        one["verdict"] = new
        print(f"run {one['run']}: {'PASS' if old['passed'] else 'FAIL'} before; {line(claim.name, new)}")
    write_json(path, record)
    return 0


def list_claims(claims: list[Any]) -> int:
    """One line a claim: its name, how the last recorded run ended, and what it says."""
    from lm.claims.store import read_json
    for claim in claims:
        runs = (read_json(RECORDS / f"{claim.name}.json") or {"runs": []})["runs"]
        last = ("PASS" if runs[-1]["verdict"]["passed"] else "FAIL") if runs else "-"
        print(f"{claim.name:<22} {last:<5} {claim.text.get('Claim', '')}")
    return 0


def write_page(claims: list[Any]) -> int:
    """docs/claims.md and docs/figures/claims/NAME.png."""
    from lm.claims.figure import draw
    from lm.claims.page import generate
    from lm.claims.store import read_json
    records = {claim.name: read_json(RECORDS / f"{claim.name}.json") for claim in claims}
    for name, record in records.items():
        shown = next((run for run in reversed(record["runs"]) if run["verdict"]["figure"]), None) if record else None
        if shown is not None:
            FIGURES.mkdir(parents=True, exist_ok=True)
            (FIGURES / f"{name}.png").write_bytes(draw(shown["verdict"]["figure"], name))
    PAGE.write_text(generate(claims, records))
    print(f"wrote {PAGE.relative_to(PAGE.parent.parent)}: {len(claims)} claims, "
          f"{sum(len(record['runs']) for record in records.values() if record)} runs")
    return 0


def run(claim: Any, args: argparse.Namespace) -> int:
    """Runs what has not been run, judges, writes results.json and figure.png, and prints the verdict."""
    from launch import config as configs
    from launch.claim_grid import run_and_tell
    from launch.config_workdir import check_place
    from lm.claims import store
    from lm.claims.figure import draw
    from lm.claims.measures import MEASURES
    from lm.claims.verdict import judge, line
    from lm.core.fields import check_known

    workdir = pathlib.Path(args.workdir or f"runs/claims/{claim.name}{'-full' if args.full else ''}")
    check_place(str(workdir))
    cells = claim.cells(args.full)
    check_known([cell.measure for cell in cells], ["train", *MEASURES], f"grid() of {claim.path.name}", "measure")
    resolved = {cell.name: configs.resolve(claim.module.get_config(), cell.overrides) for cell in cells}
    hashes = {cell.name: configs.config_hash({"config": resolved[cell.name].to_dict(), "then": list(cell.then)}
                                             if cell.then else resolved[cell.name]) for cell in cells}
    begun = store.check_grid(workdir, claim.name, hashes, args.full) or {
        "claim": claim.name, "full": args.full, "run": secrets.token_hex(4),
        "started": time.strftime("%Y-%m-%d", time.gmtime()), "cells": hashes}
    if "code" not in begun or any(store.read_cell(workdir, cell.name)["values"] is None for cell in cells):
        begun = {**begun, "code": code_state(begun.get("code"))}
        store.write_json(workdir / store.CLAIM_FILE, begun)
    stopped = run_and_tell(workdir, cells, {name: configs.to_json(config) for name, config in resolved.items()},
                           jobs=args.jobs, title=f"{claim.name}: {len(cells)} cells")
    if stopped:
        return stopped
    results = collect(begun, workdir, cells, hashes)
    results["verdict"] = verdict = judge(claim.module.check, results["cells"])
    store.write_json(workdir / store.RESULTS_FILE, results)
    if verdict["figure"]:
        (workdir / "figure.png").write_bytes(draw(verdict["figure"], claim.name))
    if args.record:
        count = store.record(RECORDS / f"{claim.name}.json", results)
        print(f"recorded ({count} runs); `lm claim --page` writes them to docs/claims.md")
    show(results)
    print(line(claim.name, verdict), flush=True)
    return 0 if verdict["passed"] else 1


def code_state(before: dict[str, Any] | None) -> dict[str, Any]:
    """{"revision", "dirty"} of the code that is about to run cells. Where other cells ran on other code before, no
    revision holds what all of them ran, which is what dirty says."""
    from launch.environment import git_state
    here = pathlib.Path(__file__).resolve()
    state = git_state(here.parent, here.name, MADE_FROM_RESULTS) or {"revision": None, "dirty": None}
    return state if before in (None, state) else {**state, "dirty": True}


def collect(begun: dict[str, Any], workdir: pathlib.Path, cells: list[Any], hashes: dict[str, str]) -> dict[str, Any]:
    """Everything that is known of a run but the verdict."""
    from launch.environment import version
    from lm.claims import store
    from lm.claims.verdict import spread
    rows = [{"name": cell.name, "arm": cell.arm, "seed": cell.seed, "measure": cell.measure,
             "config_hash": hashes[cell.name], **store.read_cell(workdir, cell.name)} for cell in cells]
    packages = {name: version(name) for name in ("loomlm", "jax", "flax", "numpy")}
    return {key: begun[key] for key in ("claim", "full", "run", "started")} | {
        **begun["code"], "python": platform.python_version(),
        "packages": packages, "totals": store.totals(rows), "cells": rows, "spread": spread(rows)}


def show(results: dict[str, Any]) -> None:
    """A line an arm: mean and spread over its seeds of the metrics that the check looks at."""
    from lm.claims.verdict import number
    for arm, metrics in results["spread"].items():
        cells = [f"{name} {number(metrics[name]['mean'])} ± {number(metrics[name]['std'])} (n={metrics[name]['n']})"
                 for name in results["verdict"]["metrics"] if name in metrics]
        print(f"  {arm}: {', '.join(cells)}" if cells else f"  {arm}")
    control, totals = results["verdict"]["control"], results["totals"]
    if control is not None:
        print(f"  control: the check passes on {control['passed']} of {control['shuffles']} shuffled copies")
    print(f"  {totals['cpu_seconds']:.0f} CPU-s in all")
