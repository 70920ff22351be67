"""Laws are found again from runs that follow them, and refused where runs do not say what they are."""

import numpy as np
import pytest

from lm.scaling import laws
from lm.scaling.laws import FitError, fit

SIZES = np.geomspace(1e5, 1e7, 6)


def runs(noise=0.0, seeds=1, law=lambda n: 1.7 + 400 * n**-0.4, seed=0):
    sizes = np.repeat(SIZES, seeds)
    return sizes, law(sizes) * np.exp(np.random.default_rng(seed).normal(0, noise, sizes.size))


def test_a_law_without_noise_is_found_exactly():
    sizes, loss = runs()
    found = fit({"N": sizes}, loss)
    assert found.numbers() == pytest.approx({"E": 1.7, "A": 400, "alpha": 0.4}, rel=1e-4)
    assert found.rms < 1e-7
    assert found(3e7) == pytest.approx(1.7 + 400 * 3e7**-0.4, rel=1e-6)


def test_a_pure_power_law_has_no_irreducible_term():
    sizes, loss = runs(law=lambda n: 40 * n**-0.2)
    assert fit({"N": sizes}, loss, irreducible=False).numbers() == pytest.approx({"A": 40, "alpha": 0.2}, rel=1e-5)
    with_term = fit({"N": sizes}, loss)
    assert with_term.irreducible < 0.02 and with_term.numbers()["alpha"] == pytest.approx(0.2, abs=0.005)
    assert fit({"N": runs()[0]}, runs()[1], irreducible=False).rms > 0.02  # and the other law is none


def test_hoffmanns_law_is_found_from_a_grid_of_sizes_and_tokens():
    """The numbers of Hoffmann et al. 2022, equation 10."""
    params, tokens = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, 4), np.geomspace(1e9, 1e11, 4)))
    loss = 1.69 + 406.4 * params**-0.34 + 410.7 * tokens**-0.28
    found = fit({"N": params, "D": tokens}, loss)
    assert found.numbers() == pytest.approx({"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}, rel=1e-3)


def test_the_gradient_of_the_objective_is_its_slope():
    rng = np.random.default_rng(1)
    u, target = rng.normal(size=(2, 9)), rng.normal(size=9)
    theta = rng.normal(size=5)
    for delta in (1e-3, 0.5, 10.0):
        value, grad = laws._objective(theta, u, target, True, delta)
        for i, step in enumerate(1e-6 * np.eye(5)):
            up, down = (laws._objective(theta + s, u, target, True, delta)[0] for s in (step, -step))
            assert (up - down) / 2e-6 == pytest.approx(grad[i], rel=1e-4, abs=1e-4 * abs(value))


def test_one_run_that_went_wrong_moves_a_huber_fit_little():
    sizes, loss = runs(seeds=3)
    loss[4] *= 1.3
    assert fit({"N": sizes}, loss).numbers()["alpha"] == pytest.approx(0.4, rel=1e-3)


@pytest.mark.parametrize(("sizes", "loss", "why"), [
    ([1e5, 1e6, 1e7], [3, 2.5, 2.2], "3 parameters need at least 4 different N; there are 3"),
    ([1e5] * 4 + [2e5, 4e5], [3, 3.1, 3, 3, 2.8, 2.6], "there are 3"),
    ([1e5, 1.1e5, 1.2e5, 1.3e5, 1.4e5], [3, 2.9, 2.8, 2.7, 2.6], "a factor of at least 2"),
    ([1e5, 1e6, 1e7, 1e8], [2, 2.5, 3, 3.5], "no falling power of N"),
    ([1e5, 1e6, 1e7, 1e8], [2, 2, 2, 2], "no falling power of N"),
    ([1e5, 1e6, 1e7, 1e8], [3, 2.5, np.nan, 2], "no number above 0"),
    ([1e5, 1e6, 1e7, 1e8], [3, 2.5, -1, 2], "no number above 0"),
    ([0, 1e6, 1e7, 1e8], [3, 2.5, 2.2, 2], "no number above 0"),
    ([], [], "there are 0"),
])
def test_runs_that_say_nothing_are_refused(sizes, loss, why):
    with pytest.raises(FitError, match=why):
        fit({"N": sizes}, loss)


def test_a_surface_needs_sizes_and_tokens_that_both_vary():
    sizes = np.geomspace(1e5, 1e7, 7)
    with pytest.raises(FitError, match="D goes from 1e\\+08 to 1e\\+08"):
        fit({"N": sizes, "D": np.full(7, 1e8)}, 1 + sizes**-0.1)
