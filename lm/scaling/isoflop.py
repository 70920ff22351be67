"""The best size for a budget of FLOPs: a parabola in the log of the size for each budget (Hoffmann et al. 2022, section
3.2), and a power law through their minima, N_opt = k C^a."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm.scaling.laws import SPAN, FitError, check


class Parabola(NamedTuple):
    """loss = least + curvature (log N - log optimum)^2. rms: of the log residuals, over runs less parameters."""

    optimum: float
    least: float
    curvature: float
    rms: float

    def __call__(self, params: Sequence[float]) -> np.ndarray:
        """The loss of that many parameters."""
        return self.least + self.curvature * (np.log(np.asarray(params, float)) - np.log(self.optimum)) ** 2


class Growth(NamedTuple):
    """y = exp(height) * flops^exponent."""

    height: float
    exponent: float

    def __call__(self, flops: Sequence[float]) -> np.ndarray:
        """y at a budget."""
        return np.exp(self.height + self.exponent * np.log(np.asarray(flops, float)))


def fit_parabola(params: Sequence[float], loss: Sequence[float]) -> Parabola:
    """Least squares over the runs of one budget.

    Raises FitError for fewer than four sizes, and where the parabola has no minimum or has it outside of them.
    """
    params, loss = np.asarray(params, float), np.asarray(loss, float)
    check(("sizes",), params[None], loss, 3)
    centre = np.log(params).mean()
    u = np.log(params) - centre
    c2, c1, c0 = np.polyfit(u, loss, 2)
    if c2 <= 0:
        raise FitError("the loss has no minimum between these sizes: it bends downwards; give smaller and larger ones")
    at = -c1 / (2 * c2)
    if not u.min() <= at <= u.max():
        side = "below the smallest" if at < u.min() else "above the largest"
        raise FitError(f"the minimum lies {side} of these sizes, {params.min():.3g} to {params.max():.3g}; give sizes "
                       f"on both sides of it")
    least = c0 - c1 * c1 / (4 * c2)
    residuals = np.log(loss) - np.log(np.polyval((c2, c1, c0), u))
    return Parabola(float(np.exp(at + centre)), float(least), float(c2),
                    float(np.sqrt(np.sum(residuals**2) / max(1, len(loss) - 3))))


def fit_growth(flops: Sequence[float], values: Sequence[float]) -> Growth:
    """A line through the logs. Raises FitError for fewer than three budgets: two points always lie on a line."""
    flops, values = np.asarray(flops, float), np.asarray(values, float)
    if len(np.unique(flops)) < 3 or flops.max() < SPAN * flops.min():
        raise FitError(f"how the best size grows needs at least 3 budgets that span a factor of {SPAN:g}, and there "
                       f"are {len(np.unique(flops))} with a minimum")
    exponent, height = np.polyfit(np.log(flops), np.log(values), 1)
    return Growth(float(height), float(exponent))
