"""Membership scores against pairs that are counted one by one, and the numbers of their papers."""

import math
import zlib

import numpy as np
import pytest

from lm.eval.membership import auc, exposure, mean_loss, min_k, reference_ratio, roc, true_positives, zlib_ratio

RNG = np.random.default_rng(0)
MEMBERS, CONTROLS = RNG.integers(0, 12, 60) / 4, RNG.integers(3, 15, 150) / 4  # with ties


def test_auc_is_the_share_of_pairs_in_the_right_order():
    pairs = [(m < c) + (m == c) / 2 for m in MEMBERS for c in CONTROLS]
    assert auc(MEMBERS, CONTROLS) == pytest.approx(np.mean(pairs))
    assert auc([0, 1], [2, 3]) == 1.0 and auc([2, 3], [0, 1]) == 0.0 and auc([1], [1]) == 0.5


def test_auc_is_the_area_under_the_curve():
    false, true = roc(MEMBERS, CONTROLS)
    assert np.trapezoid(true, false) == pytest.approx(auc(MEMBERS, CONTROLS))
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)


@pytest.mark.parametrize("limit", [0.0, 0.01, 0.1, 0.5])
def test_true_positives_over_all_thresholds(limit):
    best = 0.0
    for threshold in [-1, *MEMBERS, *CONTROLS]:
        if (threshold >= CONTROLS).mean() <= limit:
            best = max(best, (threshold >= MEMBERS).mean())
    assert true_positives(MEMBERS, CONTROLS, limit) == pytest.approx(best)


def test_few_controls_let_none_be_taken():
    assert true_positives([1, 2, 3, 4], [2.5, 9]) == 0.5


def test_scores_of_one_text():
    nats = np.array([1.0, 5.0, 3.0, 0.5, 2.0])
    assert mean_loss(nats) == pytest.approx(2.3)
    assert min_k(nats, 0.4) == 4.0 and min_k(nats, 0.01) == 5.0 and min_k(nats, 1.0) == pytest.approx(2.3)
    assert zlib_ratio(nats, "abab" * 20) == pytest.approx(11.5 / len(zlib.compress(b"abab" * 20, 9)))
    assert reference_ratio(nats, np.array([2.0, 3.0])) == pytest.approx(2.3)


def test_exposure_of_ranks():
    """Carlini et al. (2019): the best of n + 1 has log2(n + 1) bits, the last 0."""
    controls = np.arange(1023)
    assert exposure(-1, controls) == 10.0 and exposure(5000, controls) == 0.0
    assert exposure(0.5, controls) == pytest.approx(9.0) and exposure(3, [3.0, 3.0]) == pytest.approx(math.log2(3 / 2))


def test_exposure_of_a_text_like_the_others_is_one_over_log_2():
    draws = [exposure(RNG.random(), RNG.random(500)) for _ in range(2000)]
    assert np.mean(draws) == pytest.approx(1 / math.log(2), abs=0.15)
