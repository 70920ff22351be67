"""plots/experts.png: how evenly layers used their experts while training, drawn from metrics.jsonl."""

import io
import logging
import re
from typing import Any

from etils import epath

from lm.train.plots import series, smoothed
from lm.train.writers import read_rows

# Metric of a layer, and what its axis says.
PANELS = {"usage": "experts used by a batch (share)", "unevenness": "unevenness (nats)",
          "dead": "not used for dead_after steps (share)", "entropy": "entropy of a head's weights (nats)",
          "overlap": "choices of several heads (share)"}
_NAME = re.compile(r"train/(?P<layer>layer_\d+/.+)/(?P<metric>[^/]+)")


def plot_experts(workdir: epath.PathLike) -> epath.Path | None:
    """Draws a panel for each metric of `docs/experts.md` that layers reported, a curve a layer from the first (dark) to
    the last (light), into <workdir>/plots/experts.png. Returns its path, or None where no layer has experts."""
    rows = read_rows(workdir)
    names = dict.fromkeys(name for row in rows for name in row)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match is not None and match["metric"] in PANELS:
            found.setdefault(match["metric"], {})[match["layer"]] = series(rows, name)
    if "unevenness" not in found:
        return None
    path = epath.Path(workdir) / "plots" / "experts.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(draw({metric: found[metric] for metric in PANELS if metric in found},
                          epath.Path(workdir).name))
    return path


def draw(found: dict[str, dict[str, Any]], title: str) -> bytes:
    """The figure as PNG bytes."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4 * min(len(found), 3), 3 * -(-len(found) // 3)), dpi=110, layout="constrained")
    layers = sorted({layer for lines in found.values() for layer in lines},
                    key=lambda layer: (int(layer.split("/")[0].removeprefix("layer_")), layer))
    colors = {layer: colormaps["viridis"](0.85 * n / max(len(layers) - 1, 1)) for n, layer in enumerate(layers)}
    for n, (metric, lines) in enumerate(found.items(), 1):
        axes = figure.add_subplot(-(-len(found) // 3), min(len(found), 3), n)
        for layer, (steps, values) in sorted(lines.items(), key=lambda line: layers.index(line[0])):
            label = layer if layer in (layers[0], layers[-1]) else None
            axes.plot(steps, smoothed(values, len(steps) // 80), color=colors[layer], linewidth=1.4, label=label)
        axes.set_title(PANELS[metric], fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if n == 1:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
