"""The matrix as text and as the table of docs/kernels.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from launch.kernels.cells import Cell, kernels_for
from launch.kernels.process import ROOT, toolchain_of
from pallas_kernels.aot.case import Case
from pallas_kernels.aot.targets import TARGETS

PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- matrix: written by `lm kernels matrix --write` -->", "<!-- end of matrix -->"


def rows(results: Mapping[str, Any], known: Sequence[Case],
         targets: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """(one row a case and direction: name, direction, a text for each target; the reasons that texts refer to)."""
    out, reasons = [], []
    for case in known:
        for direction in case.work:
            texts = []
            for target in targets:
                names = kernels_for(case, target)
                texts.append(", ".join(_text(results.get(Cell(case.name, direction, name, target).key), name,
                                             len(names) > 1, reasons) for name in names) or "chunked")
            out.append([case.name, direction, *texts])
    return out, reasons


def _text(result: Mapping[str, Any] | None, kernel: str, several: bool, reasons: list[str]) -> str:
    prefix = f"{kernel} " if several else ""
    if result is None:
        return f"{prefix}not compiled"
    if result["status"] == "ok":
        spills = sum(kernel["spills"] for kernel in result.get("ptxas", {}).values())
        return f"{prefix}OK" + (f", spills {spills} B" if spills else "")
    if result["reason"] not in reasons:
        reasons.append(result["reason"])
    return f"{prefix}{result['status']} [{reasons.index(result['reason']) + 1}]"


def text(record: Mapping[str, Mapping[str, Any]], known: Sequence[Case]) -> str:
    """For the terminal: one table a compiler, of the targets that it has results for."""
    parts = []
    for compiler, results in record.items():
        targets = [name for name in TARGETS if any(key.endswith(f"/{name}") for key in results)]
        body, reasons = rows(results, known, targets)
        body = [row for row in body if any(key.startswith(f"{row[0]}/{row[1]}/") for key in results)]
        lines = [["operation", "direction", *targets], *body]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        parts.append("\n".join([compiler, *("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines),
                                *(f"[{i}] {reason}" for i, reason in enumerate(reasons, 1))]))
    return "\n\n".join(parts)


def markdown(record: Mapping[str, Mapping[str, Any]], known: Sequence[Case]) -> str:
    """For the page: each compiler a table, the first for TPUs and the first for GPUs with all targets, the others with
    what they were asked."""
    parts, seen = [], set()
    for compiler, results in record.items():
        toolchain = toolchain_of(compiler)
        first = toolchain not in seen
        seen.add(toolchain)
        asked = [name for name, target in TARGETS.items() if (first and target.toolchain == toolchain)
                 or any(key.endswith(f"/{name}") for key in results)]
        body, reasons = rows(results, known, asked)
        header = ["operation", "direction", *(TARGETS[name].name for name in asked)]
        lines = [header, ["---"] * len(header), *body]
        parts.append("\n".join([f"With {compiler}:", "", *(f"| {' | '.join(line)} |" for line in lines),
                                *(["", *(f"- [{i}] {reason}" for i, reason in enumerate(reasons, 1))] if reasons
                                  else [])]))
    return "\n\n".join(parts)


def write_into_page(new: str) -> None:
    """Replaces what stands between the two marks of docs/kernels.md. Raises ValueError where they are gone."""
    page = PAGE.read_text()
    if BEGIN not in page or END not in page:
        raise ValueError(f"{PAGE} has no lines {BEGIN!r} and {END!r}; the table goes between them")
    before, rest = page.split(BEGIN, 1)
    PAGE.write_text(f"{before}{BEGIN}\n\n{new}\n\n{END}{rest.split(END, 1)[1]}")
