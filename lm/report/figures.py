"""The pictures of a report: curves with their spread over seeds, and what a sweep found."""

import io
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.report.runs import Group, short
from lm.train.plots import COLORS, TRAINING, series, smoothed

PALETTE = (TRAINING, *COLORS)
MOST_POINTS = 400


def _figure(width: float = 8, height: float = 4.5) -> Any:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def curves(groups: Sequence[Group], metric: str, unit: str, *, evaluation: str | None = None) -> bytes | None:
    """Training curves, or those of an evaluation set: a line a group, the mean over its runs, in a band from the least
    to the largest. None where no run has any."""
    name = f"train/{metric}" if evaluation is None else f"eval/{evaluation}/{metric}"
    figure = _figure()
    axes, drawn, levels = figure.add_subplot(), False, []
    for n, group in enumerate(groups):
        found = [found for run in group.runs if (found := series(run.rows, name))[0]]
        if not found:
            continue
        color, drawn = PALETTE[n % len(PALETTE)], True
        steps = np.unique(np.concatenate([at for at, _ in found]))
        steps = steps[::max(1, len(steps) // MOST_POINTS)]
        values = np.full((len(found), len(steps)), np.nan)
        for i, (at, value) in enumerate(found):
            if evaluation is None and len(value) >= 40:
                value = smoothed(value, max(len(value) // 80, 2))
            values[i] = np.interp(steps, at, value, left=np.nan, right=np.nan)
        some = np.any(np.isfinite(values), axis=0)
        steps, values = steps[some], values[:, some]
        mean = np.nanmean(values, axis=0)
        label = group.label or name
        axes.plot(steps, mean, color=color, linewidth=1.6, linestyle=("-", "--", ":")[n // len(PALETTE) % 3],
                  marker="o" if evaluation or len(steps) < 3 else None, markersize=4, label=f"{label}: {mean[-1]:.4g}")
        if len(found) > 1:
            axes.fill_between(steps, np.nanmin(values, axis=0), np.nanmax(values, axis=0), color=color, alpha=0.2,
                              linewidth=0)
        levels += [np.nanmin(values), np.nanmax(values[:, len(steps) // 10:])]
    if not drawn:
        return None
    margin = 0.05 * (max(levels) - min(levels)) or 0.1
    axes.set_ylim(min(levels) - margin, max(levels) + margin)
    axes.set(xlabel="step", ylabel=unit, title="training" if evaluation is None else evaluation)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def parallel_coordinates(trials: Sequence[tuple[Mapping[str, Any], float]], metric: str, *, more: bool) -> bytes | None:
    """A line a trial over an axis a setting, coloured by the metric, the best on top. None below two trials."""
    paths = list(dict.fromkeys(path for values, _ in trials for path in values))
    if len(trials) < 2 or not paths:
        return None
    from matplotlib import colormaps
    figure = _figure(max(6, 1.6 * (len(paths) + 1)), 4.5)
    axes = figure.add_subplot()
    results = np.array([value for _, value in trials])
    columns = [_scaled([values.get(path) for values, _ in trials]) for path in paths]
    columns.append(_scaled(list(results)))
    rank = np.argsort(np.argsort(-results if more else results)) / max(len(trials) - 1, 1)
    colors = colormaps["viridis"]
    for i in np.argsort(-rank):
        axes.plot(range(len(columns)), [column[0][i] for column in columns], color=colors(0.9 * rank[i]),
                  linewidth=0.8 + 1.6 * (1 - rank[i]), alpha=0.85)
    for n, (_, ticks) in enumerate(columns):
        axes.axvline(n, color="#888888", linewidth=0.8)
        for at, text in ticks:
            axes.annotate(text, (n, at), xytext=(3, 0), textcoords="offset points", fontsize=7, color="#444444")
    axes.set_xticks(range(len(columns)), [*(path.rpartition(".")[2] for path in paths), metric.rpartition("/")[2]],
                    fontsize=8)
    axes.set_yticks([])
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.set_title(f"{len(trials)} trials; the darker, the better ({metric})", fontsize=10)
    return _png(figure)


def _scaled(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Places from 0 to 1 of values, on a logarithmic scale where they span two powers of ten, and the axis' marks; what
    is no number is spread in order of appearance, what is missing lies below."""
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if numbers and len(numbers) == sum(v is not None for v in values):
        low, high = min(numbers), max(numbers)
        if low > 0 and high / low >= 100:
            place = lambda v: math.log(v / low) / math.log(high / low)
        else:
            place = lambda v: (v - low) / (high - low) if high > low else 0.5
        return [-0.1 if v is None else place(v) for v in values], [(place(low), short(low)), (place(high), short(high))]
    kinds = list(dict.fromkeys(str(v) for v in values if v is not None))
    place = lambda v: -0.1 if v is None else kinds.index(str(v)) / max(len(kinds) - 1, 1)
    return [place(v) for v in values], [(n / max(len(kinds) - 1, 1), kind) for n, kind in enumerate(kinds)]


def bars(shares: Mapping[str, float], title: str) -> bytes:
    """Shares by name, the largest on top."""
    names = sorted(shares, key=shares.__getitem__)
    figure = _figure(7, 0.8 + 0.35 * len(names))
    axes = figure.add_subplot()
    axes.barh(names, [shares[name] for name in names], color=TRAINING)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)
