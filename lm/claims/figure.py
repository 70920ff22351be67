"""The picture of a claim, from what its check says is to be drawn."""

import io
import logging
from collections.abc import Mapping
from typing import Any

COLORS = ("#30638e", "#d1495b", "#2e8b57", "#edae49", "#6a4c93", "#00798c", "#8d5b4c")
LIMIT = "#555555"


def draw(figure: Mapping[str, Any], title: str) -> bytes:
    """PNG bytes. figure: x, y (labels), series {label: {"x": [...], "y": [[values of the seeds], ...]}}, and where
    wanted xscale, yscale ("log"), lines {label: y}. Points are means, bars go from the least to the greatest seed. An x
    of texts makes groups of columns."""
    # Without pyplot, so that no window system is asked for.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    made = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes = made.add_subplot()
    series = figure["series"]
    texts = [x for line in series.values() for x in line["x"] if isinstance(x, str)]
    places = {x: n for n, x in enumerate(dict.fromkeys(texts))}
    for n, (label, line) in enumerate(series.items()):
        means = [sum(seeds) / len(seeds) for seeds in line["y"]]
        # Not below 0: the mean of equal numbers is off by rounding.
        bars = [[max(0.0, mean - min(seeds)) for mean, seeds in zip(means, line["y"], strict=True)],
                [max(0.0, max(seeds) - mean) for mean, seeds in zip(means, line["y"], strict=True)]]
        color = COLORS[n % len(COLORS)]
        if places:
            width = 0.8 / len(series)
            at = [places[x] + (n - (len(series) - 1) / 2) * width for x in line["x"]]
            axes.bar(at, means, width * 0.92, yerr=bars, color=color, label=label, capsize=2, error_kw={"lw": 1})
        else:
            axes.errorbar(line["x"], means, yerr=bars, color=color, label=label, marker="o", markersize=4, capsize=2,
                          linewidth=1.5)
    for n, (label, value) in enumerate(figure.get("lines", {}).items()):
        axes.axhline(value, color=LIMIT, linewidth=1.1, linestyle=("--", ":", "-.")[n % 3], label=label)
    if places:
        axes.set_xticks(range(len(places)), list(places))
    else:
        axes.set_xscale(figure.get("xscale", "linear"))
    axes.set_yscale(figure.get("yscale", "linear"))
    axes.set(xlabel=figure["x"], ylabel=figure["y"], title=title)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    out = io.BytesIO()
    # Without the version of matplotlib in the file: the same numbers give the same bytes for longer.
    made.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
