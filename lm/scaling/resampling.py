"""Intervals of what was fitted, by fitting it again to runs that are drawn from the runs with replacement (Efron 1979).

An interval holds what the runs at hand leave open under the form of the law. It does not hold that the form may be
wrong beyond the largest run, and with few runs it comes out too narrow.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.scaling.laws import FitError

LEVEL = 0.9
RESAMPLES = 300
TRIES = 10  # draws a resample, on average, before it is given up


class Resampled(NamedTuple):
    """fits: one a resample. refused: how many draws could not be fitted, mostly of too few sizes, and were drawn
    again."""

    fits: list[Any]
    refused: int


def resample(fit: Callable[[np.ndarray], Any], strata: Sequence[np.ndarray], *, resamples: int = RESAMPLES,
             seed: int = 0) -> Resampled:
    """`fit` of as many draws of runs. strata: indices of runs; of each stratum as many are drawn as it has.

    Raises FitError where draws that can be fitted are too rare.
    """
    generator, fits, refused = np.random.default_rng(seed), [], 0
    while len(fits) < resamples:
        drawn = np.concatenate([generator.choice(stratum, len(stratum)) for stratum in strata])
        try:
            fits.append(fit(drawn))
        except FitError as error:
            refused += 1
            if refused > TRIES * resamples:
                raise FitError(f"no interval: of {refused + len(fits)} draws of these runs {len(fits)} could be fitted "
                               f"(the last: {error}); give more sizes or seeds") from None
    return Resampled(fits, refused)


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """The share `level` of the values that lies in the middle."""
    low, high = np.quantile(np.asarray(values, float), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def with_noise(values: Sequence[float], residuals: Sequence[float], parameters: int, seed: int) -> np.ndarray:
    """Predicted losses, each times the exponential of a log residual of the fit that is drawn at random: where another
    run, not the mean of many, may come out. Residuals are widened by what the fit's parameters took from them."""
    residuals = np.asarray(residuals, float)
    wider = np.sqrt(len(residuals) / max(1, len(residuals) - parameters))
    return np.asarray(values, float) * np.exp(wider * np.random.default_rng([seed, 1]).choice(residuals, len(values)))
