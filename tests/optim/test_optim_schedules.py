"""Learning rates by hand."""

import math

import numpy as np
import pytest

from lm.optim.options import OptimizerOptions
from lm.optim.schedules import describe, make_schedule, sparkline


def values(total, steps, **given):
    schedule = make_schedule(OptimizerOptions(**given), total)
    return [float(schedule(s)) for s in steps]


def test_wsd_by_hand():
    got = values(10, range(11), schedule="wsd", learning_rate=1.0, warmup_steps=4, decay_steps=4, final_fraction=0.2)
    np.testing.assert_allclose(got, [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)


def test_wsd_decay_as_a_fraction():
    steps = values(100, [0, 74, 75, 100], schedule="wsd", learning_rate=2.0, warmup_steps=0, decay_fraction=0.25,
                   final_fraction=0.0)
    np.testing.assert_allclose(steps, [2, 2, 2, 0], atol=1e-6)


def test_wsd_without_decay_stays():
    assert values(10, [9, 10], schedule="wsd", learning_rate=1.0, warmup_steps=1, decay_steps=0) == [1, 1]


def test_exponential_by_formula():
    """The learning rate of RWKV-4: a peak that stays, then a geometric fall; a warm-up that starts higher."""
    got = values(20, range(22), schedule="exponential", learning_rate=6e-4, final_fraction=1 / 60, warmup_steps=5,
                 warmup_start=0.4, decay_steps=10)
    want = [6e-4 * (0.4 + 0.6 * s / 4) for s in range(5)] + [6e-4] * 5 + [
        6e-4 * 60 ** (-s / 10) for s in range(11)] + [1e-5]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    whole = values(20, [3, 10, 20], schedule="exponential", learning_rate=1.0, final_fraction=0.01, warmup_steps=0)
    np.testing.assert_allclose(whole, [0.01 ** 0.15, 0.1, 0.01], rtol=1e-5)


def test_cosine_by_formula():
    got = values(20, range(21), learning_rate=3e-3, warmup_steps=5, final_fraction=0.1)
    want = [3e-3 * (s + 1) / 5 if s < 5 else
            3e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (s - 5) / 15))) for s in range(21)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_inverse_sqrt_goes_on_from_the_warmup(warmup):
    got = values(50, range(50), schedule="inverse_sqrt", learning_rate=1.0, warmup_steps=warmup)
    want = [(s + 1) / warmup if s < warmup else math.sqrt(max(warmup, 1) / (s + 1)) for s in range(50)]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_constant():
    assert values(9, [0, 1, 2, 8], schedule="constant", learning_rate=1.0, warmup_steps=2) == [0.5, 1, 1, 1]


def test_default_warmup_is_a_share_of_the_steps():
    assert values(100, [0, 4], learning_rate=1.0)[1] == 1.0
    assert values(100, [0], learning_rate=1.0) == pytest.approx([0.2])
    assert values(1_000_000, [499, 999], learning_rate=1.0, schedule="constant") == pytest.approx([0.5, 1.0])
    assert values(3, [0, 1, 2], schedule="constant", learning_rate=1.0) == [1, 1, 1]


@pytest.mark.parametrize("given, says", [
    (dict(warmup_steps=11), "more than train.steps=10"),
    (dict(schedule="wsd", warmup_steps=6, decay_steps=5), "6 warm-up and 5 decay steps"),
    (dict(schedule="exponential", warmup_steps=6, decay_steps=5), "6 warm-up and 5 decay steps"),
    (dict(schedule="cosne"), "did you mean 'cosine'"),
])
def test_schedules_that_do_not_fit_are_refused(given, says):
    with pytest.raises(ValueError, match=says):
        make_schedule(OptimizerOptions(**given), 10)


def test_description_has_the_corners():
    options = OptimizerOptions(schedule="wsd", learning_rate=1.0, warmup_steps=10, decay_steps=30, final_fraction=0.0)
    rows = dict(describe(options, 100, points=3))
    assert rows == pytest.approx({0: 0.1, 9: 1, 10: 1, 50: 1, 70: 1, 100: 0})
    line = sparkline(options, 100, width=20)
    assert len(line) == 20 and line[0] == "▁" and line[10] == "█" and line[-1] == "▁"
