"""Preference losses against closed forms, numpy re-derivations and torch, one number a pair.

w and l are chosen and rejected; P is the geometric mean of the token probabilities of a response.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.losses.preference import PREFERENCE, Cpo, Dpo, Ipo, Kto, Orpo, SimPo, Slic
from lm.losses.preference.base import log1mexp
from lm.losses.preference.odds import log_odds
from lm.losses.preference.responses import Groups, Responses, pairs_of

PAIRED = {"orpo": Orpo(), "orpo_strong": Orpo(odds_weight=1.0), "dpo": Dpo(), "dpo_smoothed": Dpo(label_smoothing=0.2),
          "dpo_robust": Dpo(label_smoothing=0.2, robust=True), "ipo": Ipo(), "ipo_a_token": Ipo(length_normalized=True),
          "simpo": SimPo(), "cpo": Cpo(), "slic": Slic()}


def draw(seed=0, n=64, dtype=np.float64):
    """(summed log-probabilities of w and l, lengths of w and l, the same sums under a reference), [n] each."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 30, (2, n)).astype(dtype)
    logp = -rng.exponential(1.0, (2, n)) * length
    return (*logp.astype(dtype), *length, *(logp + rng.normal(size=(2, n))).astype(dtype))


def value(loss, *given):
    return loss(pairs_of(*given))


# --- ORPO.

def test_orpo_at_equal_odds_is_ln_2():
    logp = jnp.array([-0.5, -3.0, -40.0])
    np.testing.assert_allclose(value(Orpo(), logp, logp, jnp.ones(3), jnp.ones(3)), np.log(2), rtol=1e-6)


def test_swapping_the_pair_changes_the_loss_by_the_log_odds_ratio():
    with jax.enable_x64(True):
        w, l, m, n, _, _ = draw()
        z = Orpo().log_odds_ratio(pairs_of(w, l, m, n))
        np.testing.assert_allclose(value(Orpo(), w, l, m, n) - value(Orpo(), l, w, n, m), -z, rtol=1e-10)


@pytest.mark.parametrize("pair", [(0.3, 0.05), (0.05, 0.3), (0.001, 0.3), (0.3, 0.999), (0.5, 0.5), (0.9, 0.01)],
                         ids=str)
def test_orpo_gradient_is_the_closed_form_and_goes_down(pair):
    """The signs: descent raises the chosen and lowers the rejected log-probability (the paper prints the opposite)."""
    with jax.enable_x64(True):
        p, q = pair
        d = p + q - 2 * p * q
        grad = jax.grad(lambda w, l: value(Orpo(), w, l, 1.0, 1.0).sum(), argnums=(0, 1))(np.log(p), np.log(q))
        np.testing.assert_allclose(grad, (-q / d, q * (1 - p) / ((1 - q) * d)), rtol=1e-9)
        assert grad[0] < 0 < grad[1]


def test_orpo_gradient_at_the_values_of_the_literature():
    """P_l / D at unlikely chosen responses stays below 1; a rejected response that is nearly certain explodes."""
    with jax.enable_x64(True):
        grad = jax.grad(lambda w, l: value(Orpo(), w, l, 1.0, 1.0).sum(), argnums=(0, 1))
        found = [float(-grad(np.log(p), np.log(q))[0]) for p, q in ((0.05, 0.3), (0.001, 0.3), (0.3, 0.05))]
        np.testing.assert_allclose(found, [0.9375, 0.9987, 0.156], atol=5e-4)
        np.testing.assert_allclose(grad(np.log(0.3), np.log(0.999))[1], 999.6, atol=0.05)


def test_orpo_gradient_equals_finite_differences():
    with jax.enable_x64(True):
        w, l, m, n, _, _ = draw(1, 8)
        run = jax.jit(lambda w, l: value(Orpo(), w, l, m, n).sum())
        grad = jax.grad(run, argnums=(0, 1))(w, l)
        for k, given in enumerate((w, l)):
            for i in range(len(given)):
                step = np.zeros(len(given))
                step[i] = 1e-6
                up, down = ((w + step, l), (w - step, l)) if k == 0 else ((w, l + step), (w, l - step))
                np.testing.assert_allclose(grad[k][i], (run(*up) - run(*down)) / 2e-6, rtol=1e-5, atol=1e-9)


def test_repeating_every_token_leaves_the_odds_ratio_as_it_is():
    w, l, m, n, _, _ = draw(2, dtype=np.float32)
    np.testing.assert_allclose(value(Orpo(), 2 * w, 2 * l, 2 * m, 2 * n), value(Orpo(), w, l, m, n), rtol=1e-6)


@pytest.mark.parametrize("name", [name if name in ("orpo", "dpo") else pytest.param(name, marks=pytest.mark.slow)
                                  for name in PAIRED])
def test_finite_in_float32_from_certain_to_impossible(name):
    logp = -jnp.asarray(np.logspace(-8, np.log10(50), 40), jnp.float32)
    w, l = (a.ravel() for a in jnp.meshgrid(logp, logp))
    one, zero = jnp.ones_like(w), jnp.zeros_like(w)
    run = jax.value_and_grad(lambda w, l: value(PAIRED[name], w, l, one, one, zero, zero).sum(), argnums=(0, 1))
    total, grads = run(w, l)
    assert bool(jnp.isfinite(total)) and all(bool(jnp.isfinite(g).all()) for g in grads)


def test_a_certain_response_is_still_pushed_down():
    """Clipping alone would stop its gradient exactly where the loss is largest."""
    grad = jax.grad(lambda l: value(Orpo(), -1.0, l, 1.0, 1.0).sum())(jnp.float32(-1e-9))
    assert grad > 1e5
    bounded = jax.grad(lambda l: value(Orpo(limit=-1e-2), -1.0, l, 1.0, 1.0).sum())(jnp.float32(-1e-9))
    assert 50 < bounded < 200


def test_log1mexp_is_exact_where_the_direct_form_is_not():
    x = -np.logspace(-7, 1, 60)
    right = np.log(-np.expm1(x))
    with np.errstate(divide="ignore"):
        naive = np.log1p(-np.exp(x.astype(np.float32)))
    np.testing.assert_allclose(log1mexp(jnp.asarray(x, jnp.float32)), right, rtol=1e-5)
    assert np.max(np.abs(naive / right - 1)) > 1e-3


def test_orpo_of_unlikely_responses_is_the_probability_ratio():
    """The terms log(1 - P) vanish as both P go to 0."""
    w, l = jnp.float32([-20.0, -18.0]), jnp.float32([-19.0, -21.0])
    np.testing.assert_allclose(value(Orpo(), w, l, jnp.ones(2), jnp.ones(2)), jax.nn.softplus(l - w), rtol=1e-6)


# --- The others.

def test_dpo_of_the_reference_itself_is_ln_2_with_gradient_half_beta():
    w, l, m, n, _, _ = draw(3, dtype=np.float32)
    loss = Dpo(beta=0.3)
    total, grads = jax.value_and_grad(lambda a, b: value(loss, a, b, m, n, w, l).sum(), argnums=(0, 1))(w, l)
    np.testing.assert_allclose(total, len(w) * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(grads[0], -0.15, rtol=1e-6)
    np.testing.assert_allclose(grads[1], 0.15, rtol=1e-6)


def test_robust_dpo_is_unbiased_under_flipped_labels():
    """(1 - e) times the loss of the pair plus e times that of the flipped pair is the loss without noise."""
    with jax.enable_x64(True):
        w, l, m, n, rw, rl = draw(4)
        robust, share = Dpo(label_smoothing=0.2, robust=True), 0.2
        mixed = (1 - share) * value(robust, w, l, m, n, rw, rl) + share * value(robust, l, w, n, m, rl, rw)
        np.testing.assert_allclose(mixed, value(Dpo(), w, l, m, n, rw, rl), rtol=1e-10)


def test_simpo_without_margin_is_the_sigmoid_of_mean_log_probabilities():
    w, l, m, n, _, _ = draw(5, dtype=np.float32)
    found = value(SimPo(beta=1.0, gamma=0.0), w, l, m, n)
    np.testing.assert_allclose(found, np.log1p(np.exp(l / n - w / m)), rtol=1e-5)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


ORACLES = {
    "orpo": lambda w, l, m, n, rw, rl: -np.log(sigmoid(
        (w / m - l / n) - (np.log1p(-np.exp(w / m)) - np.log1p(-np.exp(l / n))))),
    "dpo": lambda w, l, m, n, rw, rl: -np.log(sigmoid(0.1 * ((w - l) - (rw - rl)))),
    "dpo_smoothed": lambda w, l, m, n, rw, rl: (-0.8 * np.log(sigmoid(0.1 * ((w - l) - (rw - rl))))
                                                - 0.2 * np.log(sigmoid(-0.1 * ((w - l) - (rw - rl))))),
    "dpo_robust": lambda w, l, m, n, rw, rl: (-0.8 * np.log(sigmoid(0.1 * ((w - l) - (rw - rl))))
                                              + 0.2 * np.log(sigmoid(-0.1 * ((w - l) - (rw - rl))))) / 0.6,
    "ipo": lambda w, l, m, n, rw, rl: ((w - rw) - (l - rl) - 5.0) ** 2,
    "ipo_a_token": lambda w, l, m, n, rw, rl: ((w - rw) / m - (l - rl) / n - 5.0) ** 2,
    "simpo": lambda w, l, m, n, rw, rl: -np.log(sigmoid(2.0 * (w / m - l / n) - 1.0)),
    "cpo": lambda w, l, m, n, rw, rl: -np.log(sigmoid(0.1 * (w - l))),
    "slic": lambda w, l, m, n, rw, rl: np.maximum(0, 1 - 0.1 * ((w - l) - (rw - rl))),
}


@pytest.mark.parametrize("name", ORACLES)
def test_equals_the_formula_in_numpy(name):
    given = draw(6)
    with jax.enable_x64(True):
        np.testing.assert_allclose(value(PAIRED[name], *given), ORACLES[name](*given), rtol=1e-9)
    single = tuple(np.float32(a) for a in given)
    np.testing.assert_allclose(value(PAIRED[name], *single), ORACLES[name](*given), rtol=2e-5, atol=1e-6)


def test_kto_equals_a_loop_and_its_baseline_is_never_negative():
    rng = np.random.default_rng(7)
    ratio = rng.normal(size=(3, 12))
    present = rng.random((3, 12)) < 0.7

    def kto(shift):
        sizes = jnp.ones(12)
        groups = Groups(*(Responses(jnp.asarray(r + (shift if k == 2 else 0)), sizes, jnp.zeros(12), jnp.asarray(p))
                          for k, (r, p) in enumerate(zip(ratio, present, strict=True))))
        loss = Kto(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
        return loss(groups), loss.counted(groups), loss.baseline(groups)

    for shift in (2.0, -2.0):
        with jax.enable_x64(True):
            values, counted, z0 = kto(shift)
        right = max(0.0, float(np.mean((ratio[2] + shift)[present[2]])))
        assert float(z0) == pytest.approx(right) and (right == 0) == (shift < 0)
        for i in range(12):
            assert float(values[i, 0]) == pytest.approx(1.5 * (1 - sigmoid(0.3 * (ratio[0, i] - right))))
            assert float(values[i, 1]) == pytest.approx(0.5 * (1 - sigmoid(0.3 * (right - ratio[1, i]))))
        np.testing.assert_array_equal(counted, np.stack([present[0], present[1]], -1))


def test_no_gradient_flows_through_the_baseline_of_kto():
    def total(other):
        one = jnp.ones(3)
        scored = lambda logp: Responses(logp, one, jnp.zeros(3), one > 0)
        return Kto()(Groups(scored(-one), scored(-2 * one), scored(other))).sum()
    other = jnp.float32([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(jax.grad(total)(other), 0)
    assert float(total(other)) != float(total(other + 1))


def test_every_loss_of_pairs_is_here_and_wants_the_chosen_response_more_likely():
    assert {type(loss) for loss in PAIRED.values()} | {Kto} == set(PREFERENCE.values())
    w, l, m, n, rw, rl = (jnp.asarray(a, jnp.float32) for a in draw(8, 16))
    for name, loss in PAIRED.items():
        up, down = jax.grad(lambda w, l, loss=loss: value(loss, w, l, m, n, rw, rl).sum(), argnums=(0, 1))(w, l)
        if not name.startswith("ipo"):  # its squared margin can be overshot
            assert float(up.max()) <= 0 <= float(down.min()), name


def test_a_missing_reference_says_so():
    with pytest.raises(ValueError, match="reference"):
        value(Dpo(), *draw()[:4])


@pytest.mark.parametrize("make", [lambda: Dpo(label_smoothing=0.6), lambda: Dpo(robust=True), lambda: Orpo(limit=0.0),
                                  lambda: Ipo(beta=0.0)])
def test_settings_that_make_no_loss_are_refused(make):
    with pytest.raises(ValueError, match=r"must be|needs"):
        make().check()


# --- The formulas as torch computes them.

def test_orpo_and_dpo_equal_the_formulas_of_trl_in_torch():
    """TRL's expressions (odds_ratio_loss, dpo_loss with sigmoid), written out in torch in float64."""
    torch = pytest.importorskip("torch")
    w, l, m, n, rw, rl = draw(9)
    tw, tl, trw, trl = (torch.tensor(a, dtype=torch.float64) for a in (w, l, rw, rl))
    tm, tn = torch.tensor(m), torch.tensor(n)
    gm = lambda x: torch.where(x > -0.6931471805599453, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
    odds = (tw / tm - tl / tn) - (gm(tw / tm) - gm(tl / tn))
    orpo = -torch.nn.functional.logsigmoid(odds)
    dpo = -torch.nn.functional.logsigmoid(0.1 * ((tw - tl) - (trw - trl)))
    with jax.enable_x64(True):
        np.testing.assert_allclose(value(Orpo(), w, l, m, n), orpo.numpy(), rtol=1e-10)
        np.testing.assert_allclose(value(Dpo(), w, l, m, n, rw, rl), dpo.numpy(), rtol=1e-10)
    single = [np.float32(a) for a in (w, l, m, n, rw, rl)]
    np.testing.assert_allclose(value(Orpo(), *single[:4]), orpo.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value(Dpo(), *single), dpo.numpy(), rtol=1e-5, atol=1e-6)


def test_log_odds_is_the_logarithm_of_the_odds():
    p = np.linspace(0.01, 0.99, 33)
    np.testing.assert_allclose(jax.jit(functools.partial(log_odds, limit=-1e-7))(jnp.asarray(np.log(p), jnp.float32)),
                               np.log(p / (1 - p)), rtol=1e-5, atol=1e-6)
