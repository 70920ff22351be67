"""The picture of a ladder: losses over sizes with the laws through them, and the parabolas of budgets."""

import io
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

COLORS = ("#30638e", "#d1495b", "#2e8b57", "#edae49", "#6a4c93", "#00798c", "#8d5b4c")


def draw(found: Mapping[str, Any]) -> bytes:
    """PNG bytes of what `scale.json` holds."""
    # Without pyplot, so that no window system is asked for.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure
    ratios = sorted({run["ratio"] for run in found["runs"] if run["ratio"] is not None})
    budgets = sorted({run["budget"] for run in found["runs"] if run["budget"] is not None})
    panels = [one for one, there in ((_matched, ratios), (_parabolas, budgets)) if there]
    made = Figure(figsize=(7.5 * max(1, len(panels)), 4.8), dpi=110, layout="constrained")
    for n, panel in enumerate(panels):
        axes = made.add_subplot(1, len(panels), n + 1)
        panel(axes, found, ratios if panel is _matched else budgets)
        axes.set_xscale("log")
        axes.set(xlabel="parameters N", ylabel=found["metric"])
        axes.grid(True, which="both", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    out = io.BytesIO()
    made.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _matched(axes: Any, found: Mapping[str, Any], ratios: list[float]) -> None:
    from matplotlib.ticker import FormatStrFormatter
    axes.set_yscale("log")
    for place in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        place(FormatStrFormatter("%g"))
    for n, ratio in enumerate(ratios):
        color = COLORS[n % len(COLORS)]
        runs = [run for run in found["runs"] if run["ratio"] == ratio]
        params = [run["params"] for run in runs]
        axes.plot(params, [run["loss"] for run in runs], "o", color=color, markersize=4,
                  label=f"{ratio:g} tokens a parameter")
        said = [one for one in found["predictions"] if one["ratio"] == ratio and "L(N)" in one["law"]]
        x = np.geomspace(min(params), max([*params, *(one["params"] for one in said)]), 80)
        for law in found["laws"]:
            if law["ratio"] == ratio and law["x"] == ["N"] and "numbers" in law:
                value = law["numbers"]
                axes.plot(x, value.get("E", 0.0) + value["A"] * x ** -value["alpha"], color=color, linewidth=1.2,
                          linestyle="-" if law["irreducible"] else ":", label=law["law"])
        for one in said:
            if one["interval"] is not None and "E +" in one["law"]:
                low, high = one["interval"]
                axes.errorbar([one["params"]], [one["loss"]], yerr=[[max(0.0, one["loss"] - low)],
                              [max(0.0, high - one["loss"])]], color=color, marker="s", markerfacecolor="white",
                              markersize=5, capsize=3, label=f"{one['size']}, predicted")
        seen = {(one["params"], value) for one in said for value in one["found"]}
        if seen:
            axes.plot(*zip(*sorted(seen), strict=True), "*", color="black", markersize=8, label="found")


def _parabolas(axes: Any, found: Mapping[str, Any], budgets: list[float]) -> None:
    for n, row in enumerate(found["isoflop"]["budgets"]):
        color = COLORS[n % len(COLORS)]
        runs = [run for run in found["runs"] if run["budget"] == row["flops"]]
        params = [run["params"] for run in runs]
        axes.plot(params, [run["loss"] for run in runs], "o", color=color, markersize=4,
                  label=f"{row['flops']:.2g} FLOPs")
        if "params" in row:
            x = np.geomspace(min(params), max(params), 60)
            axes.plot(x, row["loss"] + row["curvature"] * np.log(x / row["params"]) ** 2, color=color, linewidth=1.2)
            axes.plot([row["params"]], [row["loss"]], "D", color=color, markersize=6)
