"""Where a claim keeps what came out: one folder a cell, results.json beside them, and the record of all runs.

<workdir>/claim.json      name, grid and number of this run
<workdir>/cells/NAME/     config.json, cell.json (values and every attempt), log.txt, run/ (the workdir of `lm train`)
<workdir>/results.json    everything, with the verdict
record                    experiments/claims/results/NAME.json: {"claim": NAME, "runs": [results, ...]}
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

CLAIM_FILE, RESULTS_FILE, CELL_FILE, CELLS = "claim.json", "results.json", "cell.json", "cells"


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes the file in one piece: a reader finds the old text or the new one. Numbers that are not finite become
    text, as JSON has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")
    beside.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_json(path: pathlib.Path) -> Any:
    """The content of a file that `write_json` made; None where there is none. Raises ValueError for one that is cut
    off."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}); remove it, and what it held is run again") from None


def cell_folder(workdir: pathlib.Path, name: str) -> pathlib.Path:
    """The folder of one cell."""
    return workdir / CELLS / name


def read_cell(workdir: pathlib.Path, name: str) -> dict[str, Any]:
    """What is known of a cell: `values` (None until it has finished) and `attempts`."""
    return read_json(cell_folder(workdir, name) / CELL_FILE) or {"values": None, "attempts": []}


def add_attempt(workdir: pathlib.Path, name: str, attempt: Mapping[str, Any],
                values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Notes a run of a cell, successful or not, beside those before, and its numbers where it gave any."""
    known = read_cell(workdir, name)
    known = {"values": values, "attempts": [*known["attempts"], dict(attempt)]}
    write_json(cell_folder(workdir, name) / CELL_FILE, known)
    return known


def check_grid(workdir: pathlib.Path, name: str, hashes: Mapping[str, str], full: bool) -> dict[str, Any] | None:
    """What claim.json of a workdir says, None where it is new. Raises ValueError where it was made by another claim or
    other settings: its numbers would be mixed with those of this grid."""
    known = read_json(workdir / CLAIM_FILE)
    if known is None:
        return None
    if known["claim"] != name or known["full"] != full:
        grid = "the long grid of " if known["full"] else ""
        raise ValueError(f"{workdir} holds {grid}claim {known['claim']!r}; give another --workdir")
    changed = sorted({cell for cell in {*hashes, *known["cells"]} if hashes.get(cell) != known["cells"].get(cell)})
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(f"{workdir} was made by another grid: {', '.join(changed[:3])}{more} differ; give another "
                         f"--workdir")
    return known


def record(path: pathlib.Path, results: Mapping[str, Any]) -> int:
    """Adds a run to the record of its claim, or replaces it where the same run was recorded before. Returns how many
    runs it holds. Nothing is ever removed."""
    known = read_json(path) or {"claim": results["claim"], "runs": []}
    runs = [dict(results) if run["run"] == results["run"] else run for run in known["runs"]]
    if results["run"] not in [run["run"] for run in runs]:
        runs.append(dict(results))
    write_json(path, {"claim": results["claim"], "runs": runs})
    return len(runs)


def totals(cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds over all attempts: `cpu_seconds`, and `wall_seconds` added up as if cells ran one after the other."""
    return {name: round(sum(attempt.get(name, 0.0) for cell in cells for attempt in cell["attempts"]), 1)
            for name in ("cpu_seconds", "wall_seconds")}
