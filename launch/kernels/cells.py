"""The cells of the matrix: which there are, which have to be compiled again, and the file that keeps the results."""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from launch.kernels.process import ROOT
from pallas_kernels.aot.case import DIRECTIONS, Case
from pallas_kernels.aot.targets import TARGETS

RECORD = ROOT / "docs" / "kernels.json"


class Cell(NamedTuple):
    case: str
    direction: str
    kernel: str
    target: str

    @property
    def key(self) -> str:
        """Its name in the file."""
        return "/".join(self)

    @property
    def toolchain(self) -> str:
        """What compiles it: "libtpu" or "cuda"."""
        return TARGETS[self.target].toolchain


def kernels_for(case: Case, target: str) -> tuple[str, ...]:
    """Kernels of the operation that are made for this target; none where `chunked` serves."""
    return tuple(kernel for kernel in TARGETS[target].kernels if kernel in case.kernels)


def plan(cases: Iterable[Case], targets: Iterable[str], direction: str | None = None) -> list[Cell]:
    """All cells that a compiler can be asked about, in the order of the table."""
    directions = [direction] if direction else DIRECTIONS
    return [Cell(case.name, one, kernel, target) for case in cases for one in directions if one in case.work
            for target in targets for kernel in kernels_for(case, target)]


def read(path: pathlib.Path = RECORD) -> dict[str, dict[str, Any]]:
    """Compiler to key to result. Empty where there is no file. Raises ValueError for a file that is none of ours."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())["compilers"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of `lm kernels matrix` ({error!r}); delete it, and `lm kernels matrix "
                         "--write` makes a new one") from None


def write(record: Mapping[str, Mapping[str, Any]], path: pathlib.Path = RECORD) -> None:
    """Writes the file, one line a cell, so that a change of one cell is a change of one line."""
    blocks = []
    for compiler, cells in record.items():
        lines = ",\n".join(f"   {json.dumps(key)}: {json.dumps(cells[key], sort_keys=True)}" for key in sorted(cells))
        blocks.append(f"  {json.dumps(compiler)}: {{\n{lines}\n  }}")
    path.write_text('{"compilers": {\n' + ",\n".join(blocks) + "\n}}\n")


def split_by_change(cells: Iterable[Cell], known: Mapping[str, Any],
                    sources: Mapping[tuple[str, str], str]) -> tuple[list[Cell], list[Cell]]:
    """(cells to compile, cells whose sources are those of the record). sources: present hashes, by case and kernel."""
    changed, same = [], []
    for cell in cells:
        recorded = known.get(cell.key, {}).get("sources")
        (same if recorded == sources[cell.case, cell.kernel] else changed).append(cell)
    return changed, same


def sample(cells: Iterable[Cell], share: float, commit: str) -> list[Cell]:
    """About `share` of the cells, at least one where there are any, drawn by the commit: each commit draws others."""
    cells = list(cells)
    drawn = sorted(cells, key=lambda cell: hashlib.sha256(f"{commit} {cell.key}".encode()).hexdigest())
    return drawn[:max(round(share * len(cells)), 1 if share > 0 else 0)]
