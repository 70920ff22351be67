"""What was found of a ladder as tables: printed, and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """A title, and rows of text under a head."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The tables of `scale.json`, those without rows left out."""
    level = f"{found['level']:.0%}"
    runs = [[run["name"], number(run["params"]), number(run["tokens"]), f"{run['tokens'] / run['params']:.3g}",
             number(run["flops"]), loss(run["loss"])] for run in found["runs"]]
    runs += [[one["name"], "", "", "", "", f"failed: {one['error']}"] for one in found["failed"]]
    laws = [[group(law), law["law"], f"refused: {law['refused']}" if "refused" in law else numbers(law),
             f"{law['rms']:.2%}" if "rms" in law else "", note(law)] for law in found["laws"]]
    held = [[group(one), one["law"], one["size"], loss(one.get("predicted")), loss(one["found"]),
             off(one.get("predicted"), one["found"]) or one.get("refused", "")] for one in found["held_out"]]
    said = [[group(one), one["size"], number(one["params"]), number(one["tokens"]), one["law"], loss(one["loss"]),
             between(one["interval"], loss), " ".join(loss(value) for value in one["found"]),
             off(one["loss"], mean(one["found"])) if one["found"] else ""] for one in found["predictions"]]
    out = [Table("Runs", ("run", "N", "D", "D / N", "FLOPs", found["metric"]), runs),
           Table(f"Laws, with {level} intervals", ("tokens a parameter", "law", "numbers", "residuals", "note"), laws),
           Table("The largest size, from the others", ("tokens a parameter", "law", "size", "predicted", "found",
                                                        "predicted is off by"), held),
           Table("The next size", ("tokens a parameter", "size", "N", "D", "law", "predicted", f"{level} of runs",
                                   "found", "predicted is off by"), said)]
    if found["isoflop"]:
        budgets = [[number(row["flops"]), str(row["runs"]), number(row.get("params")),
                    between(row.get("params_interval"), number), number(row.get("tokens")), loss(row.get("loss")),
                    row.get("refused") or row.get("no_interval") or note(row)] for row in found["isoflop"]["budgets"]]
        out.append(Table("The best size of a budget", ("FLOPs", "runs", "N", level, "D", "loss", "note"), budgets))
        growth = found["isoflop"]["growth"]
        rows = [["N and D", growth["refused"], ""]] if "refused" in growth else [
            [f"{letter} of the best ~ C^a", f"a = {growth[name]['exponent']:.3f}",
             between(growth[name].get("interval"), lambda v: f"{v:.3f}")]
            for name, letter in (("params", "N"), ("tokens", "D"))]
        out.append(Table("How it grows", ("", "", level), rows))
    return [table for table in out if table.rows]


def to_markdown(found: Mapping[str, Any], picture: str) -> str:
    """The page."""
    parts = [f"# Scaling ladder\n\n{about(found)}\n\n![losses and laws]({picture})"]
    for table in tables(found):
        lines = [table.head, ["---"] * len(table.head), *table.rows]
        parts.append(f"## {table.title}\n\n" + "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


def about(found: Mapping[str, Any]) -> str:
    """How the numbers were made, in words."""
    what = "all parameters" if found["count"] == "all" else "parameters without embedding, positions and head"
    return (f"N counts {what}, D the positions of the batches, C training FLOPs. Laws: Huber loss of log residuals, "
            f"delta 1e-3 (Hoffmann et al. 2022). Intervals: the middle {found['level']:.0%} of "
            f"{found['resamples']} fits to runs drawn with replacement from the runs (seed {found['seed']}); a draw "
            f"that cannot be fitted is drawn again. They hold neither a law of another form nor settings that were not "
            f"tuned for each size.")


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def group(one: Mapping[str, Any]) -> str:
    """Which runs a law is of."""
    return "all" if one["ratio"] is None else f"{one['ratio']:g}"


def number(value: float | None) -> str:
    """A count."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value < 1e7 else f"{value:.3g}"


def loss(value: float | None) -> str:
    """A loss."""
    return "" if value is None else f"{value:.4f}"


def between(ends: Sequence[float] | None, text: Any) -> str:
    """An interval."""
    return "" if ends is None else f"{text(ends[0])} to {text(ends[1])}"


def numbers(law: Mapping[str, Any]) -> str:
    """E, A, alpha, B and beta with their intervals."""
    ends = law.get("intervals", {})
    return ", ".join(f"{name} {value:.4g}" + (f" ({ends[name][0]:.4g} to {ends[name][1]:.4g})" if name in ends else "")
                     for name, value in law["numbers"].items())


def note(row: Mapping[str, Any]) -> str:
    """What has to be known of an interval."""
    if "no_interval" in row:
        return row["no_interval"]
    return f"{row['redrawn']} draws repeated" if row.get("redrawn") else ""


def off(predicted: float | None, found: float) -> str:
    """Predicted over found, less one."""
    return "" if predicted is None else f"{predicted / found - 1:+.2%}"
