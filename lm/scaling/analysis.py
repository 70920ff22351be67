"""From the runs of a ladder to everything that is said about them, as plain data: `scale.json` without the runs.

Which laws are tried depends on how the runs were laid out; one that cannot be told is there with the reason.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.scaling.isoflop import fit_growth, fit_parabola
from lm.scaling.laws import FitError, Law, fit
from lm.scaling.resampling import LEVEL, RESAMPLES, interval, resample, with_noise

X = {"N": "params", "C": "flops", "D": "tokens"}


class Run(NamedTuple):
    """A run that ended. size: its name. params, tokens, flops: N, D and C of the run. loss: its last evaluation. ratio:
    tokens a parameter that were asked for, or budget: FLOPs; the other is None."""

    size: str
    seed: int
    params: float
    tokens: float
    flops: float
    loss: float
    ratio: float | None = None
    budget: float | None = None


class Next(NamedTuple):
    """The size that is predicted, with the tokens a parameter that it gets (None: of a budget)."""

    size: str
    params: float
    tokens: float
    flops: float
    ratio: float | None = None


def analyse(runs: Sequence[Run], following: Sequence[Next] = (), *, level: float = LEVEL, resamples: int = RESAMPLES,
            seed: int = 0) -> dict[str, Any]:
    """`laws`, `isoflop`, `predictions` and `held_out` of these runs. The same seed gives the same numbers."""
    how = dict(level=level, resamples=resamples, seed=seed)
    laws, predictions, held_out = [], [], []
    ratios = sorted({run.ratio for run in runs if run.ratio is not None})
    for ratio in ratios:
        matched = [run for run in runs if run.ratio == ratio]
        ahead = [one for one in following if one.ratio == ratio]
        for name in ("N", "C"):
            for irreducible in (True, False):
                law, said = one_law(matched, (name,), irreducible, ahead, **how)
                laws.append({"ratio": ratio, **law})
                predictions += [{"ratio": ratio, **one} for one in said]
        held_out += [{"ratio": ratio, **one} for one in without_largest(matched)]
    budgets = sorted({run.budget for run in runs if run.budget is not None})
    if len(ratios) + len(budgets) > 1:
        law, said = one_law(runs, ("N", "D"), True, following, **how)
        laws.append({"ratio": None, **law})
        predictions += [{"ratio": None, **one} for one in said]
    isoflop = isoflops([run for run in runs if run.budget is not None], **how) if budgets else None
    return {**how, "laws": laws, "predictions": predictions, "held_out": held_out, "isoflop": isoflop}


def title(names: Sequence[str], irreducible: bool) -> str:
    """The law as a formula."""
    terms = " + ".join(f"{big} {name}^-{small}" for name, big, small in
                       zip(names, ("A", "B"), ("alpha", "beta"), strict=False))
    return f"L({', '.join(names)}) = {'E + ' if irreducible else ''}{terms}"


def one_law(runs: Sequence[Run], names: Sequence[str], irreducible: bool, following: Sequence[Next], *, level: float,
            resamples: int, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the law with its intervals, what it predicts), or (the law with `refused`, nothing)."""
    said: dict[str, Any] = {"law": title(names, irreducible), "x": list(names), "irreducible": irreducible}
    xs = {name: np.array([getattr(run, X[name]) for run in runs]) for name in names}
    loss = np.array([run.loss for run in runs])
    again = lambda drawn, near=None: fit({n: x[drawn] for n, x in xs.items()}, loss[drawn], irreducible=irreducible,
                                         near=near)
    everything = np.arange(len(runs))
    try:
        law = again(everything)
    except FitError as error:
        return {**said, "refused": str(error)}, []
    said |= {"runs": len(runs), "numbers": law.numbers(), "rms": law.rms}
    try:
        drawn = resample(lambda which: again(which, law), [everything], resamples=resamples, seed=seed)
    except FitError as error:
        drawn, said["no_interval"] = None, str(error)
    if drawn is not None:
        said |= {"intervals": {name: interval([one.numbers()[name] for one in drawn.fits], level)
                               for name in law.numbers()}, "redrawn": drawn.refused}
    residuals = np.log(loss) - np.log(law(*xs.values()))
    parameters = 2 * len(names) + irreducible
    return said, [prediction(said["law"], law, one, names, residuals, parameters, drawn, level, seed)
                  for one in following]


def prediction(formula: str, law: Law, one: Next, names: Sequence[str], residuals: np.ndarray, parameters: int,
               drawn: Any, level: float, seed: int) -> dict[str, Any]:
    """The loss of a size by a law, and where a run of it comes out."""
    at = [getattr(one, X[name]) for name in names]
    out = {"law": formula, "size": one.size, "params": one.params, "tokens": one.tokens, "flops": one.flops,
           "loss": float(law(*at)), "interval": None}
    if drawn is not None:
        out["interval"] = interval(with_noise([float(again(*at)) for again in drawn.fits], residuals, parameters, seed),
                                   level)
    return out


def without_largest(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the laws of N say of the largest size when they have not seen it, beside what its runs came to."""
    top = max(run.params for run in runs)
    seen, held = [run for run in runs if run.params < top], [run for run in runs if run.params == top]
    out = []
    for irreducible in (True, False):
        said = {"law": title(("N",), irreducible), "size": held[0].size,
                "found": float(np.mean([run.loss for run in held]))}
        try:
            law = fit({"N": [run.params for run in seen]}, [run.loss for run in seen], irreducible=irreducible)
        except FitError as error:
            out.append({**said, "refused": str(error)})
            continue
        out.append({**said, "predicted": float(law(top))})
    return out


def isoflops(runs: Sequence[Run], *, level: float, resamples: int, seed: int) -> dict[str, Any]:
    """The parabola of each budget, and how best size, tokens and loss grow with the budget."""
    rows = []
    for budget in sorted({run.budget for run in runs}):
        mine = [run for run in runs if run.budget == budget]
        params, loss = np.array([run.params for run in mine]), np.array([run.loss for run in mine])
        row: dict[str, Any] = {"flops": budget, "runs": len(mine)}
        try:
            found = fit_parabola(params, loss)
        except FitError as error:
            rows.append({**row, "refused": str(error)})
            continue
        row |= {"params": found.optimum, "loss": found.least, "curvature": found.curvature,
                "tokens": tokens_at(mine, found.optimum)}
        try:
            drawn = resample(lambda which, p=params, y=loss: fit_parabola(p[which], y[which]), [np.arange(len(mine))],
                             resamples=resamples, seed=seed)
            row |= {"params_interval": interval([one.optimum for one in drawn.fits], level),
                    "loss_interval": interval([one.least for one in drawn.fits], level), "redrawn": drawn.refused}
            row["drawn"] = [one.optimum for one in drawn.fits]
        except FitError as error:
            row["no_interval"] = str(error)
        rows.append(row)
    good = [row for row in rows if "refused" not in row]
    growth: dict[str, Any] = {}
    try:
        for name in ("params", "tokens"):
            one = fit_growth([row["flops"] for row in good], [row[name] for row in good])
            growth[name] = {"exponent": one.exponent, "height": one.height}
        if all("drawn" in row for row in good):
            again = [fit_growth([row["flops"] for row in good], optima).exponent
                     for optima in zip(*(row["drawn"] for row in good), strict=True)]
            growth["params"]["interval"] = interval(again, level)
    except FitError as error:
        growth = {"refused": str(error)}
    return {"budgets": [{k: v for k, v in row.items() if k != "drawn"} for row in rows], "growth": growth}


def tokens_at(runs: Sequence[Run], params: float) -> float:
    """Tokens that the budget of these runs pays for at that size: between runs, straight in logs."""
    ordered = sorted((run.params, run.tokens) for run in runs)
    logs = np.log(np.array(ordered))
    return float(np.exp(np.interp(np.log(params), logs[:, 0], logs[:, 1])))
