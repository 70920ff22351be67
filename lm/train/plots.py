"""plots/loss.png: how the training went, drawn from metrics.jsonl."""

import io
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from lm.train.writers import read_rows

COLORS = ("#d1495b", "#2e8b57", "#edae49", "#6a4c93", "#00798c")
TRAINING, BASELINE = "#30638e", "#555555"


def series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of a metric, in order of step; of rows with the same step the last one counts."""
    found = {row["step"]: row[name] for row in rows if row.get(name) is not None and math.isfinite(row[name])}
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def smoothed(values: Sequence[float], radius: int) -> list[float]:
    """Mean over each value and its neighbours up to `radius` away, over as many on both sides at the ends: centred, so
    that a falling curve is not drawn late."""
    sums = [0.0, *itertools.accumulate(values)]
    out = []
    for n in range(len(values)):
        reach = min(radius, n, len(values) - 1 - n)
        out.append((sums[n + reach + 1] - sums[n - reach]) / (2 * reach + 1))
    return out


def plot_loss(workdir: epath.PathLike, *, baselines: Mapping[str, float] | None = None) -> epath.Path | None:
    """Draws the training curve, the evaluations and horizontal lines into <workdir>/plots/loss.png. Returns its path,
    or None where metrics.jsonl has no training loss yet.

    The unit is bits per byte where `train/bits_per_byte` was logged, else nats per token. Evaluations are all
    `eval/<set>/...` of the same unit. baselines: name to bits per byte; they are drawn only in that unit.
    """
    rows = read_rows(workdir)
    metric, unit = "bits_per_byte", "bits per byte"
    if not series(rows, "train/bits_per_byte")[0]:
        metric, unit = "loss", "loss (nats per token)"
    steps, values = series(rows, f"train/{metric}")
    if not steps:
        return None
    names = dict.fromkeys(name for row in rows for name in row)
    evaluations = {name.split("/", 1)[1].rsplit("/", 1)[0]: series(rows, name)
                   for name in names if name.startswith("eval/") and name.endswith(f"/{metric}")}
    evaluations = {label: found for label, found in evaluations.items() if found[0]}
    lines = dict(baselines or {}) if metric == "bits_per_byte" else {}

    picture = draw(steps, values, evaluations, lines, unit, epath.Path(workdir).name)
    path = epath.Path(workdir) / "plots" / "loss.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture)
    return path


def draw(steps: list[int], values: list[float], evaluations: Mapping[str, tuple[list[int], list[float]]],
         baselines: Mapping[str, float], unit: str, title: str) -> bytes:
    """The figure as PNG bytes."""
    # Imported here: it takes a good part of a second that every start of the program would pay. Without pyplot, so that
    # no window system is asked for; quiet about font caches and home folders that cannot be written.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if len(steps) >= 40:
        axes.plot(steps, values, color=TRAINING, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(values, max(len(steps) // 80, 2)), color=TRAINING, linewidth=1.8, label="training")
    else:
        marker = "o" if len(steps) < 3 else None  # one point alone is no line
        axes.plot(steps, values, color=TRAINING, linewidth=1.8, marker=marker, label="training")
    for n, (label, (at, found)) in enumerate(evaluations.items()):
        axes.plot(at, found, color=COLORS[n % len(COLORS)], linewidth=1.2, marker="o", markersize=4.5,
                  label=f"{label}: {found[-1]:.3f}")
    for n, (label, value) in enumerate(baselines.items()):
        axes.axhline(value, color=BASELINE, linewidth=1.2, linestyle=("--", ":", "-.")[n % 3],
                     label=f"{label}: {value:.3f}")

    # The first steps fall from log(vocabulary); they would press all the rest into the lowest part of the picture.
    levels = [v for _, found in evaluations.values() for v in found[len(found) > 1:]] + list(baselines.values())
    settled = values[len(values) // 20:]
    low, high = min(settled + levels), max(settled + levels)
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(left=min(steps[0], 0), right=max([steps[-1], *(at[-1] for at, _ in evaluations.values())]) * 1.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="step", ylabel=unit, title=title)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
