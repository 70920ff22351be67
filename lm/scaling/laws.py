"""Power laws of the loss, fitted as Hoffmann et al. 2022 (arXiv:2203.15556, section 3.3) fit theirs.

    L(x) = E + A x^-alpha                        x: parameters or FLOPs, at a fixed number of tokens a parameter
    L(N, D) = E + A N^-alpha + B D^-beta         N parameters, D tokens

The sum over runs of the Huber loss (delta 1e-3) of log L_fit - log L is minimised by L-BFGS from a grid of starts.
Their losses were averaged, which stopped the search too early (Besiroglu et al. 2024, arXiv:2404.10102); sums are
taken here, and delta is lowered to 1e-3 in steps, so that a start far away does not stay there.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

DELTA = 1e-3
DELTAS = (0.1, 0.01, DELTA)
EXPONENTS = (-1.0, 4.0)  # where they are looked for; one at an end, or not above 0, is refused
SMALLEST = 1e-4  # an E below this share of the least loss is 0
SPAN = 2.0  # between the least and the largest x


class FitError(ValueError):
    """The runs do not say what the law is: too few, too close, or no fall of the loss."""


class Law(NamedTuple):
    """loss = exp(constant) + sum over k of exp(height_k) * x_k^-exponent_k. names: of the x. constant: None for no
    irreducible term. rms: root mean square of the log residuals, over runs less parameters."""

    names: tuple[str, ...]
    constant: float | None
    heights: tuple[float, ...]
    exponents: tuple[float, ...]
    rms: float

    @property
    def irreducible(self) -> float:
        """E."""
        return 0.0 if self.constant is None else float(np.exp(self.constant))

    def __call__(self, *xs: Any) -> np.ndarray:
        """The loss at x_1, x_2, ... (numbers or arrays)."""
        terms = [np.exp(height - exponent * np.log(np.asarray(x, float)))
                 for height, exponent, x in zip(self.heights, self.exponents, xs, strict=True)]
        return self.irreducible + sum(terms)

    def numbers(self) -> dict[str, float]:
        """Name to value of E, A, alpha, B and beta, as far as the law has them."""
        out = {} if self.constant is None else {"E": self.irreducible}
        for (big, small), height, exponent in zip((("A", "alpha"), ("B", "beta")), self.heights, self.exponents,
                                                  strict=False):
            out |= {big: float(np.exp(height)), small: float(exponent)}
        return out


def fit(xs: Mapping[str, Sequence[float]], loss: Sequence[float], *, irreducible: bool = True,
        near: Law | None = None) -> Law:
    """The law of these runs. xs: name to its value in every run, one for L(x), two for L(N, D). loss: in nats or bits.
    near: a law to start from instead of the grid, for runs that were drawn again.

    Raises FitError for fewer distinct x than parameters of the law plus one, x that span less than a factor of 2,
    losses that are no positive numbers, and where the best exponent is not above 0 or has no end.
    """
    names = tuple(xs)
    x = np.array([np.asarray(xs[name], float) for name in names])
    loss = np.asarray(loss, float)
    check(names, x, loss, 2 * len(names) + irreducible)
    logs, target = np.log(x), np.log(loss)
    centre = logs.mean(axis=1)
    u = logs - centre[:, None]
    bounds = _bounds(target, len(names), irreducible)
    if near is None:
        found = [_minimised(one, u, target, irreducible, bounds, DELTAS[0], rounds=40)
                 for one in _grid(target, len(names), irreducible)]
        starts = [one.x for one in sorted(found, key=lambda one: one.fun)[:3]]
    else:
        starts = [_inside(near, centre, irreducible)]
    best = min((_refined(one, u, target, irreducible, bounds) for one in starts), key=lambda one: one.fun).x
    constant, heights, exponents = _split(best, irreducible)
    for name, exponent in zip(names, exponents, strict=True):
        if exponent <= 1e-3 or exponent >= EXPONENTS[1] - 1e-3:
            raise FitError(f"the loss is no falling power of {name}: the best exponent is {exponent:.3g}; give sizes "
                           f"that differ more, or more runs")
    residuals = _predicted(best, u, irreducible)[0] - target
    rms = float(np.sqrt(np.sum(residuals**2) / max(1, len(loss) - len(best))))
    if constant is not None and np.exp(constant) < SMALLEST * loss.min():
        constant = -np.inf  # the bound of the search, not a finding
    return Law(names, constant if constant is None else float(constant),
               tuple(float(h + e * c) for h, e, c in zip(heights, exponents, centre, strict=True)),
               tuple(float(e) for e in exponents), rms)


def check(names: Sequence[str], x: np.ndarray, loss: np.ndarray, parameters: int) -> None:
    """Raises FitError where a law of so many parameters cannot be told from these runs."""
    if not (np.all(np.isfinite(loss)) and np.all(loss > 0) and np.all(np.isfinite(x)) and np.all(x > 0)):
        raise FitError("a run has a loss or a size that is no number above 0; leave it out")
    distinct = np.unique(np.round(np.log(x), 6), axis=1).shape[1] if x.size else 0
    if distinct <= parameters:
        raise FitError(f"{parameters} parameters need at least {parameters + 1} different {' and '.join(names)}; "
                       f"there are {distinct}")
    for name, row in zip(names, x, strict=True):
        few = len(names) > 1 and len(np.unique(np.round(np.log(row), 6))) < 3
        if few or row.max() < SPAN * row.min():
            raise FitError(f"{name} goes from {row.min():.3g} to {row.max():.3g}; a law needs a factor of at least "
                           f"{SPAN:g}{' and three values' if len(names) > 1 else ''}")


def _split(theta: np.ndarray, irreducible: bool) -> tuple[float | None, np.ndarray, np.ndarray]:
    rest = theta[irreducible:]
    return (theta[0] if irreducible else None), rest[0::2], rest[1::2]


def _predicted(theta: np.ndarray, u: np.ndarray, irreducible: bool) -> tuple[np.ndarray, np.ndarray]:
    """(log of the loss [n], its gradient [parameters, n])."""
    _, heights, exponents = _split(theta, irreducible)
    terms = heights[:, None] - exponents[:, None] * u
    if irreducible:
        terms = np.concatenate([np.full((1, u.shape[1]), theta[0]), terms])
    top = terms.max(axis=0)
    parts = np.exp(terms - top)
    whole = parts.sum(axis=0)
    weights = parts / whole
    grads = [weights[0]] if irreducible else []
    for weight, row in zip(weights[irreducible:], u, strict=True):
        grads += [weight, -weight * row]
    return top + np.log(whole), np.array(grads)


def _objective(theta: np.ndarray, u: np.ndarray, target: np.ndarray, irreducible: bool, delta: float
               ) -> tuple[float, np.ndarray]:
    """Sum of Huber losses in units of delta squared, and its gradient."""
    predicted, grads = _predicted(theta, u, irreducible)
    r = (predicted - target) / delta
    inside = np.abs(r) <= 1
    value = np.where(inside, 0.5 * r * r, np.abs(r) - 0.5).sum()
    return float(value), grads @ (np.clip(r, -1, 1) / delta)


def _minimised(start: np.ndarray, u: np.ndarray, target: np.ndarray, irreducible: bool, bounds: Any, delta: float,
               rounds: int = 1000) -> Any:
    from scipy.optimize import minimize
    return minimize(_objective, start, (u, target, irreducible, delta), "L-BFGS-B", jac=True, bounds=bounds,
                    options={"maxiter": rounds, "ftol": 1e-14, "gtol": 1e-9})


def _refined(theta: np.ndarray, u: np.ndarray, target: np.ndarray, irreducible: bool, bounds: Any) -> Any:
    """From a wide Huber loss, which is a square, to the narrow one."""
    for delta in DELTAS:
        found = _minimised(theta, u, target, irreducible, bounds, delta)
        theta = found.x
    return found


def _bounds(target: np.ndarray, terms: int, irreducible: bool) -> list[tuple[float, float]]:
    low, high = target.min() + np.log(SMALLEST) - 1, target.max() + 1
    return [(low, target.max())] * irreducible + [(low, high), EXPONENTS] * terms


def _grid(target: np.ndarray, terms: int, irreducible: bool) -> list[np.ndarray]:
    shares = (0.05, 0.5, 0.85) if irreducible else (0.0,)
    out = []
    for share, *exponents in itertools.product(shares, *[(0.08, 0.3, 0.9)] * terms):
        least = share * np.exp(target.min())
        height = np.log((np.exp(target.mean()) - least) / terms)
        out.append(np.array([*([np.log(least)] if irreducible else []), *(v for e in exponents for v in (height, e))]))
    return out


def _inside(law: Law, centre: np.ndarray, irreducible: bool) -> np.ndarray:
    """The parameters of a law as the search has them, around another centre."""
    heights = [h - e * c for h, e, c in zip(law.heights, law.exponents, centre, strict=True)]
    pairs = [v for pair in zip(heights, law.exponents, strict=True) for v in pair]
    constant = max(law.constant, -20.0) if irreducible else None
    return np.array([constant, *pairs] if irreducible else pairs)
