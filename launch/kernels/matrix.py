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
    targets = [find_target(name).name for name in args.target or ()]
    python = args.python or sys.executable
    compilers = process.compiler_for(python, targets)
    planned = cell_files.plan(known, targets or TARGETS, args.direction)
    record, sources = cell_files.read(), hashes(known)
    compile_one = lambda cell: process.run(python, cell, args.limit)
    if args.check:
        if not record:
            raise ValueError(f"{cell_files.RECORD} does not exist; `lm kernels matrix --write` makes it")
        everything = not (args.ops or args.target or args.direction)
        codes = [check(of(toolchain, planned), of_record(toolchain, record), compiler, sources, compile_one,
                       args.sample, commit(), args.seconds, everything) for toolchain, compiler in compilers.items()]
        return max(check_unseen(planned, record, sources, compilers), *codes)
    shown: dict[str, dict[str, Any]] = {}
    left = []
    for toolchain, compiler in compilers.items():
        wanted = of(toolchain, planned)
        if args.write:
            shown[compiler], more = write(wanted, record, compiler, sources, compile_one, args.seconds, args.all)
        else:
            shown[compiler], more = compile_all(wanted, compile_one, sources, args.seconds)
        left += more
    if args.write:
        table.write_into_page(table.markdown(record, cases()))
    print(json.dumps(shown, indent=2) if args.json else table.text(shown, known))
    report_left(left)
    bad = [result for results in shown.values() for result in results.values() if result["status"] != "ok"]
    return 1 if left or bad else 0


def of(toolchain: str, wanted: list[Cell]) -> list[Cell]:
    """The cells that this toolchain compiles."""
    return [cell for cell in wanted if cell.toolchain == toolchain]


def of_record(toolchain: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The compilers of the record that are of this toolchain."""
    return {compiler: results for compiler, results in record.items() if process.toolchain_of(compiler) == toolchain}


def write(wanted: list[Cell], record: dict[str, dict[str, Any]], compiler: str,
          sources: Mapping[tuple[str, str], str], compile_one: Callable[[Cell], dict], seconds: float | None,
          everything: bool) -> tuple[dict[str, Any], list[Cell]]:
    """Compiles what changed, or everything, into the record and its file; (results, cells that time ran out for)."""
    if not everything:
        wanted, same = cell_files.split_by_change(wanted, record.get(compiler, {}), sources)
        print(f"{len(same)} cells are as recorded for {compiler}", file=sys.stderr)
    keys = {cell.key for cell in cell_files.plan(cases(), TARGETS)}
    kept = {key: result for key, result in record.get(compiler, {}).items() if key in keys}   # what is gone leaves

    def keep(results: Mapping[str, Any]) -> None:
        """After each cell, so that what was compiled is not lost with an interrupt."""
        if kept or results:
            record[compiler] = kept | results
            cell_files.write(record)

    results, left = compile_all(wanted, compile_one, sources, seconds, keep)
    keep(results)
    return results, left


def hashes(known: list[Case]) -> dict[tuple[str, str], str]:
    """(case, kernel) to the hash of the kernel's sources."""
    return {(case.name, kernel): source_hash(op, kernel) for op in operations() for case in cases(op) if case in known
            for kernel in case.kernels}


def commit() -> str:
    """The commit that is checked out, which draws the sample; "none" outside of git."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=process.ROOT)
    return done.stdout.strip() if done.returncode == 0 else "none"


def compile_all(wanted: list[Cell], compile_one: Callable[[Cell], dict], sources: Mapping[tuple[str, str], str],
                seconds: float | None,
                keep: Callable[[dict[str, Any]], None] | None = None) -> tuple[dict[str, Any], list[Cell]]:
    """(key to result with the hash of its sources, cells that no time was left for). Progress goes to stderr.

    keep: gets all results so far after each cell.
    """
    start, results = time.monotonic(), {}
    for number, cell in enumerate(wanted):
        if seconds is not None and time.monotonic() - start > seconds:
            return results, wanted[number:]
        results[cell.key] = compile_one(cell) | {"sources": sources[cell.case, cell.kernel]}
        if keep:
            keep(results)
        print(f"[{number + 1}/{len(wanted)}] {cell.key}: {results[cell.key]['status']}", file=sys.stderr, flush=True)
    return results, []


def check(wanted: list[Cell], record: Mapping[str, Mapping[str, Any]], compiler: str,
          sources: Mapping[tuple[str, str], str], compile_one: Callable[[Cell], dict], share: float, commit: str,
          seconds: float | None, everything: bool = True) -> int:
    """1 where a cell that is OK in the record is not OK now or is no cell any more, else 0.

    wanted and record: of one toolchain. The record of this compiler counts, and where it has none, the first one, with
    every cell compiled again. What changed comes first, then the sample; everything=False is for a part of the matrix.
    """
    known = record.get(compiler)
    changed, same = cell_files.split_by_change(wanted, known or {}, sources)
    drawn = cell_files.sample(same, share, commit)
    print(f"{compiler}: {len(changed)} cells changed, {len(drawn)} drawn of {len(same)} unchanged", file=sys.stderr)
    known = next(iter(record.values()), {}) if known is None else known
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


def check_unseen(wanted: list[Cell], record: Mapping[str, Mapping[str, Any]], sources: Mapping[tuple[str, str], str],
                 compilers: Mapping[str, str]) -> int:
    """1 where a recorded cell that no compiler here can ask about is of sources that changed since, else 0."""
    stale = []
    for compiler, results in record.items():
        toolchain = process.toolchain_of(compiler)
        if toolchain not in compilers:
            recorded = [cell for cell in of(toolchain, wanted) if cell.key in results]
            stale += cell_files.split_by_change(recorded, results, sources)[0]
            print(f"{compiler}: not here; {len(recorded)} cells compared by their sources", file=sys.stderr)
    for cell in stale:
        print(f"{cell.key} was recorded with other sources and there is no compiler for it here: "
              f"{process.INSTALL[cell.toolchain]}, then `lm kernels matrix --write --target {cell.target}`")
    return 1 if stale else 0


def report_left(left: list[Cell]) -> None:
    """Says which cells the time did not suffice for."""
    if left:
        print(f"no time was left for {len(left)} cells: {', '.join(cell.key for cell in left)}", file=sys.stderr)
