"""`lm kernels matrix`: operation x direction x target, compiled for real, against what was recorded before."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from launch.kernels import cells as cell_files
from launch.kernels import process, table
from launch.kernels.cells import Cell
from pallas_kernels.aot.case import Case, cases, operations, selected
from pallas_kernels.aot.sources import source_hash
from pallas_kernels.aot.targets import TARGETS, find_target


def run(args: argparse.Namespace) -> int:
    """Compiles and prints; 1 where a cell is not OK or was not reached, with `--check` where one was OK and is not."""
    if args.check and args.write:
        raise ValueError("--check compares with the record and --write replaces it: give one of them")
    if not 0 <= args.sample <= 1:
        raise ValueError(f"--sample is a share from 0 to 1; got {args.sample}")
    known = selected(args.ops)
    targets = [find_target(name).name for name in args.target or TARGETS]
    wanted = cell_files.plan(known, targets, args.direction)
    python = process.python_with_libtpu(args.python)
    compiler = process.compiler_version(python)
    record, sources = cell_files.read(), hashes(known)
    compile_one = lambda cell: process.run(python, cell, args.limit)
    if args.check:
        everything = not (args.ops or args.target or args.direction)
        return check(wanted, record, compiler, sources, compile_one, args.sample, commit(), args.seconds, everything)
    if args.write and not args.all:
        wanted, same = cell_files.split_by_change(wanted, record.get(compiler, {}), sources)
        print(f"{len(same)} cells are as recorded for {compiler}", file=sys.stderr)
    keys = {cell.key for cell in cell_files.plan(cases(), TARGETS)}
    kept = {key: result for key, result in record.get(compiler, {}).items() if key in keys}   # what is gone leaves

    def keep(results: Mapping[str, Any]) -> None:
        """After each cell, so that what was compiled is not lost with an interrupt."""
        record[compiler] = kept | results
        cell_files.write(record)

    results, left = compile_all(wanted, compile_one, sources, args.seconds, keep if args.write else None)
    if args.write:
        keep(results)
        table.write_into_page(table.markdown(record, cases()))
    shown = {compiler: results}
    print(json.dumps(shown, indent=2) if args.json else table.text(shown, known))
    report_left(left)
    return 1 if left or any(result["status"] != "ok" for result in results.values()) else 0


def hashes(known: list[Case]) -> dict[str, str]:
    """Case to the hash of its sources."""
    return {case.name: source_hash(op) for op in operations() for case in cases(op) if case in known}


def commit() -> str:
    """The commit that is checked out, which draws the sample; "none" outside of git."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=process.ROOT)
    return done.stdout.strip() if done.returncode == 0 else "none"


def compile_all(wanted: list[Cell], compile_one: Callable[[Cell], dict], sources: Mapping[str, str],
                seconds: float | None,
                keep: Callable[[dict[str, Any]], None] | None = None) -> tuple[dict[str, Any], list[Cell]]:
    """(key to result with the hash of its sources, cells that no time was left for). Progress goes to stderr.

    keep: gets all results so far after each cell.
    """
    start, results = time.monotonic(), {}
    for number, cell in enumerate(wanted):
        if seconds is not None and time.monotonic() - start > seconds:
            return results, wanted[number:]
        results[cell.key] = compile_one(cell) | {"sources": sources[cell.case]}
        if keep:
            keep(results)
        print(f"[{number + 1}/{len(wanted)}] {cell.key}: {results[cell.key]['status']}", file=sys.stderr, flush=True)
    return results, []


def check(wanted: list[Cell], record: Mapping[str, Mapping[str, Any]], compiler: str, sources: Mapping[str, str],
          compile_one: Callable[[Cell], dict], share: float, commit: str, seconds: float | None,
          everything: bool = True) -> int:
    """1 where a cell that is OK in the record is not OK now or is no cell any more, else 0.

    The record of this compiler counts, and where it has none, the first one, with every cell compiled again. What
    changed comes first, then the sample; everything=False is for a part of the matrix.
    """
    if not record:
        raise ValueError(f"{cell_files.RECORD} does not exist; `lm kernels matrix --write` makes it")
    known = record.get(compiler)
    changed, same = cell_files.split_by_change(wanted, known or {}, sources)
    drawn = cell_files.sample(same, share, commit)
    print(f"{compiler}: {len(changed)} cells changed, {len(drawn)} drawn of {len(same)} unchanged", file=sys.stderr)
    known = next(iter(record.values())) if known is None else known
    results, left = compile_all(changed + drawn, compile_one, sources, seconds)
    failures = [f"{key} was OK and is {result['status']} now: {result['reason']}" for key, result in results.items()
                if result["status"] != "ok" and known.get(key, {}).get("status") == "ok"]
    if everything:
        keys = {cell.key for cell in wanted}
        failures += [f"{key} was OK and is no cell any more; `lm kernels matrix --write` where that is meant"
                     for key, result in known.items() if key not in keys and result["status"] == "ok"]
    for key, result in results.items():
        if result["status"] != "ok" and known.get(key, {}).get("status") != "ok":
            print(f"not OK, as before: {key}: {result['reason']}" if key in known else
                  f"new and not OK: {key}: {result['reason']}")
    good = sum(result["status"] == "ok" for result in results.values())
    print("\n".join(failures) or f"{good} of {len(results)} cells OK, and none that was OK is not any more")
    report_left(left)
    return 1 if failures else 0


def report_left(left: list[Cell]) -> None:
    """Says which cells the time did not suffice for."""
    if left:
        print(f"no time was left for {len(left)} cells: {', '.join(cell.key for cell in left)}", file=sys.stderr)
