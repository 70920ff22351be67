"""What is said of a ladder: intervals that hold the truth, predictions, the best size of a budget, and refusals."""

import numpy as np
import pytest

from lm.scaling.analysis import Next, Run, analyse, one_law
from lm.scaling.isoflop import fit_growth, fit_parabola
from lm.scaling.laws import FitError, fit
from lm.scaling.resampling import interval, resample, with_noise


def truth(params, tokens):
    return 1.5 + 30 * params**-0.3 + 60 * tokens**-0.3


def ladder(ratios=(20,), noise=0.002, seeds=2, sizes=6, seed=0):
    """Runs of 6 N D FLOPs, and the next size."""
    rng = np.random.default_rng(seed)
    runs = [Run(f"n{i}", s, n, r * n, 6 * n * r * n, float(truth(n, r * n) * np.exp(rng.normal(0, noise))), ratio=r)
            for r in ratios for i, n in enumerate(np.geomspace(1e4, 1e6, sizes)) for s in range(seeds)]
    return runs, [Next("next", 4e6, r * 4e6, 24e6 * r * 4e6, r) for r in ratios]


def test_a_matched_ladder_gives_its_exponent_and_the_next_size():
    runs, following = ladder(seed=2)
    said = analyse(runs, following, resamples=25)
    law = said["laws"][0]
    assert law["law"] == "L(N) = E + A N^-alpha" and law["ratio"] == 20
    assert law["numbers"]["alpha"] == pytest.approx(0.3, abs=0.05)
    low, high = law["intervals"]["alpha"]
    assert low < 0.3 < high and high - low < 0.2
    first = said["predictions"][0]
    assert first["interval"][0] < truth(4e6, 8e7) < first["interval"][1]
    assert first["loss"] == pytest.approx(truth(4e6, 8e7), rel=0.01)
    assert said["held_out"][0]["predicted"] == pytest.approx(said["held_out"][0]["found"], rel=0.02)
    by_flops = next(one for one in said["laws"] if one["x"] == ["C"] and one["irreducible"])
    assert by_flops["numbers"]["alpha"] == pytest.approx(law["numbers"]["alpha"] / 2, rel=0.02)  # C is 120 N^2


def test_the_same_seed_gives_the_same_numbers():
    runs, following = ladder(sizes=5)
    said = [analyse(runs, following, resamples=3, seed=seed) for seed in (0, 0, 1)]
    assert said[0] == said[1] != said[2]


def test_three_sizes_are_too_few_for_an_irreducible_term_and_it_is_said():
    said = analyse(ladder(sizes=3)[0], resamples=5)
    with_term, without = said["laws"][:2]
    assert "need at least 4 different N; there are 3" in with_term["refused"] and "numbers" not in with_term
    assert without["numbers"]["alpha"] > 0
    assert "refused" in said["held_out"][0]
    assert "refused" in analyse(ladder(sizes=1)[0])["laws"][1]


def test_without_seeds_and_with_the_fewest_sizes_there_is_a_law_and_draws_are_repeated():
    law = analyse(ladder(sizes=4, seeds=1)[0], resamples=5)["laws"][0]
    assert law["numbers"]["E"] > 0
    # Of four runs, one draw in 11 has all four sizes; the others were drawn again.
    assert law.get("redrawn", 0) > 5 or "no interval" in law["no_interval"]


def test_several_ratios_give_the_surface():
    runs, _ = ladder(ratios=(5, 20, 80), noise=0.0, seeds=1, sizes=4)
    law = analyse(runs, resamples=1)["laws"][-1]
    assert law["law"] == "L(N, D) = E + A N^-alpha + B D^-beta"
    assert law["numbers"] == pytest.approx({"E": 1.5, "A": 30, "alpha": 0.3, "B": 60, "beta": 0.3}, rel=1e-2)


def budget_runs(budgets, sizes=5, noise=0.0):
    """Sizes around the optimum of `truth` with 6 N D FLOPs: alpha = beta, so the best D / N is the same everywhere."""
    rng = np.random.default_rng(0)
    best = lambda c: (30 / 60) ** (1 / 0.6) * (c / 6) ** 0.5
    return [Run(f"n{i}", 0, n, c / 6 / n, c, float(truth(n, c / 6 / n) * np.exp(rng.normal(0, noise))), budget=c)
            for c in budgets for i, n in enumerate(best(c) * np.geomspace(0.25, 4, sizes))], best


def test_the_minima_of_budgets_grow_as_they_should():
    runs, best = budget_runs((1e12, 1e13, 1e14))
    said = analyse(runs, resamples=10)
    rows = said["isoflop"]["budgets"]
    assert [row["params"] for row in rows] == pytest.approx([best(row["flops"]) for row in rows], rel=0.03)
    assert [row["tokens"] for row in rows] == pytest.approx([r["flops"] / 6 / r["params"] for r in rows], rel=0.01)
    growth = said["isoflop"]["growth"]
    assert growth["params"]["exponent"] == pytest.approx(0.5, abs=0.01)
    assert growth["tokens"]["exponent"] == pytest.approx(0.5, abs=0.01)
    assert all(row["params_interval"][0] <= row["params"] * 1.05 for row in rows)


def test_a_minimum_outside_of_the_sizes_is_refused():
    params = np.geomspace(1e4, 1e6, 5)
    with pytest.raises(FitError, match="above the largest"):
        fit_parabola(params, (np.log(params) - np.log(1e8)) ** 2 + 1)
    with pytest.raises(FitError, match="below the smallest"):
        fit_parabola(params, (np.log(params) - np.log(1e2)) ** 2 + 1)
    with pytest.raises(FitError, match="bends downwards"):
        fit_parabola(params, 100 - (np.log(params) - np.log(1e5)) ** 2)
    with pytest.raises(FitError, match="at least 4 different sizes"):
        fit_parabola(params[:3], [3, 2, 3])
    found = fit_parabola(params, 2 + 0.1 * (np.log(params) - np.log(3e5)) ** 2)
    assert (found.optimum, found.least, found.curvature) == pytest.approx((3e5, 2, 0.1))


def test_two_budgets_are_no_law():
    with pytest.raises(FitError, match="at least 3 budgets"):
        fit_growth([1e12, 1e13], [1e4, 1e5])
    said = analyse(budget_runs((1e12, 1e13))[0], resamples=1)["isoflop"]
    assert "refused" in said["growth"] and "params" in said["budgets"][0]


def test_draws_that_never_fit_are_an_error_and_no_loop():
    def never(drawn):
        raise FitError("not this one")
    with pytest.raises(FitError, match=r"no interval.*not this one"):
        resample(never, [np.arange(4)], resamples=5)


def test_draws_keep_to_their_strata():
    seen = resample(lambda drawn: sorted(drawn), [np.array([0, 1]), np.array([5, 6, 7])], resamples=50).fits
    assert all(len([i for i in one if i < 2]) == 2 and len(one) == 5 for one in seen)
    assert len({tuple(one) for one in seen}) > 5


def test_noise_widens_a_prediction_by_the_residuals():
    made = with_noise(np.full(4000, 2.0), [-0.01, 0.01], 0, 0)
    assert interval(made) == pytest.approx((2 * np.exp(-0.01), 2 * np.exp(0.01)))
    assert interval(with_noise(np.full(4000, 2.0), [-0.01, 0.01, -0.01, 0.01], 3, 0))[1] == pytest.approx(
        2 * np.exp(0.02))


@pytest.mark.slow
def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Of 40 ladders, each with its own noise. A bootstrap of 12 runs is too narrow: 90% of it may hold the truth less
    often, and here at least 70% are asked for (and not all, or the interval says nothing)."""
    held, next_held = 0, 0
    for seed in range(40):
        runs, following = ladder(noise=0.003, seed=seed)
        law, said = one_law(runs, ("N",), True, following, level=0.9, resamples=60, seed=0)
        best = fit({"N": [r.params for r in runs]}, [float(truth(r.params, 20 * r.params)) for r in runs])
        low, high = law["intervals"]["alpha"]
        held += low <= best.numbers()["alpha"] <= high
        low, high = said[0]["interval"]
        next_held += low <= following_loss(seed) <= high
    print("of 40 intervals", held, "hold alpha and", next_held, "the next run")
    assert 28 <= held < 40 and next_held >= 28, (held, next_held)


def following_loss(seed):
    """A run of the next size."""
    return float(truth(4e6, 8e7) * np.exp(np.random.default_rng([seed, 9]).normal(0, 0.003)))
