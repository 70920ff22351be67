"""The pictures of `lm analyze`, as PNG bytes."""

import io
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.analysis.decay import Curve
from lm.analysis.trace import Trace


def draw_decay(curves: Sequence[Curve], title: str) -> bytes:
    """One sorted curve a layer, from the first (dark) to the last (light)."""
    figure, axes = _figure((7, 4.5))
    colors = _colormap()(np.linspace(0, 0.85, len(curves)))
    for n, (curve, color) in enumerate(zip(curves, colors, strict=True)):
        label = f"layer {curve.depth}" if n in (0, len(curves) - 1) else None
        axes.plot(np.linspace(0, 1, len(curve.factors)), curve.factors, color=color, linewidth=1.4, label=label)
    axes.set(xlabel="channels, sorted (share)", ylabel="what is left of the past after a token", title=title)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _png(figure)


def draw_trace(trace: Trace, tokens: Sequence[str], subject: tuple[int, int], title: str) -> bytes:
    """The restored log-probability by layer and token; the subject's tokens are marked with a star."""
    layers, count = trace.restored.shape
    figure, axes = _figure((2.5 + 0.42 * layers, 1.6 + 0.28 * count))
    image = axes.imshow(trace.restored.T, aspect="auto", cmap=_colormap(), vmin=trace.corrupted,
                        vmax=max(trace.clean, trace.corrupted + 1e-6))
    names = [f"{token!r}{' *' if subject[0] <= n < subject[1] else ''}" for n, token in enumerate(tokens)]
    axes.set_yticks(range(count), names, fontsize=8)
    axes.set(xlabel="restored layer", title=title)
    figure.colorbar(image, label=f"log p(answer); clean {trace.clean:.2f}, corrupted {trace.corrupted:.2f}")
    return _png(figure)


def draw_experts(scores: Mapping[str, np.ndarray], title: str) -> bytes:
    """One curve a layer: its experts' shares of the router's weight, times their number, from the most used on."""
    figure, axes = _figure((7, 4.5))
    colors = _colormap()(np.linspace(0, 0.85, len(scores)))
    lowest = 1.0
    for (layer, found), color in zip(scores.items(), colors, strict=True):
        share = np.sort(found)[::-1] * len(found) / max(found.sum(), 1e-30)
        used = share[share > 0]
        lowest = min([lowest, *used])
        axes.plot((np.arange(len(used)) + 0.5) / len(found), used, color=color, linewidth=1.4,
                  label=f"{layer}: {len(used) / len(found):.1%} of {len(found):,} used")
    axes.axhline(1, color="#555555", linewidth=1.0, linestyle="--", label="all alike")
    axes.set(xlabel="experts, from the most used on (share of all)", ylabel="weight, times an even share", title=title,
             yscale="log", xlim=(0, 1), ylim=(max(lowest, 1e-4) * 0.8, None))
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _png(figure)


def _figure(size: tuple[float, float]) -> Any:
    # Imported here, and without pyplot: no window system is asked for, and starting the program stays fast.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    return figure, figure.add_subplot()


def _colormap() -> Any:
    from matplotlib import colormaps
    return colormaps["viridis"]


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
