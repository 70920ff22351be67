"""Each filter against a plain loop over probabilities, and what must never be drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.generate.sampling import (
    GREEDY,
    SamplingOptions,
    filtered,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    row_keys,
    sample,
)

INF = np.inf


def random_logits(rows=5, vocab=23, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, vocab)).astype(np.float32) * 2


def kept(logits):
    return [set(np.flatnonzero(row > -INF).tolist()) for row in np.asarray(logits)]


def softmax(row):
    e = np.exp(row.astype(np.float64) - row.max())
    return e / e.sum()


def ranked(row):
    """Ids from the most probable down, lower ids first where equal."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


def oracle_top_p(row, p):
    out, mass = set(), 0.0
    for i in ranked(row):
        if mass >= p and out:
            break
        out.add(i)
        mass += softmax(row)[i]
    return out


@pytest.mark.parametrize("k", [1, 2, 7, 23, 100])
def test_top_k_keeps_the_k_largest(k):
    logits = random_logits()
    out = np.asarray(keep_top_k(jnp.array(logits), k))
    assert kept(out) == [set(ranked(row)[:k]) for row in logits]
    np.testing.assert_array_equal(out[out > -INF], logits[out > -INF])


def test_top_k_of_ties_keeps_exactly_k_lower_ids():
    assert kept(keep_top_k(jnp.array([[1.0, 3.0, 3.0, 3.0, 0.0]]), 2)) == [{1, 2}]


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_the_fewest_that_make_p(p):
    logits = random_logits(seed=1)
    assert kept(keep_top_p(jnp.array(logits), p)) == [
        set(range(23)) if p == 1 else oracle_top_p(row, p) for row in logits]


def test_top_p_of_ties_takes_lower_ids_and_only_as_many_as_needed():
    assert kept(keep_top_p(jnp.zeros((1, 10)), 0.35)) == [{0, 1, 2, 3}]


@pytest.mark.parametrize("p", [0.0, 0.05, 0.3, 1.0])
def test_min_p_keeps_what_is_p_times_as_probable_as_the_best(p):
    logits = random_logits(seed=2)
    oracle = []
    for row in logits:
        prob = softmax(row)
        oracle.append({i for i in range(len(row)) if prob[i] >= p * prob.max() * (1 - 1e-6)})
    assert kept(keep_min_p(jnp.array(logits), p)) == oracle


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    out = penalize_repetition(jnp.array([[2.0, -2.0, 2.0, -2.0]]), jnp.array([[True, True, False, False]]), 4.0)
    np.testing.assert_allclose(out, [[0.5, -8.0, 2.0, -2.0]])


def test_filters_compose_in_the_order_temperature_k_p_min_p():
    options = SamplingOptions(temperature=0.7, top_k=9, top_p=0.8, min_p=0.1)
    logits = random_logits(seed=3)
    out = np.asarray(filtered(jnp.array(logits), options))
    for row, got in zip(logits, out, strict=True):
        row = row / np.float32(0.7)
        row = np.where(np.isin(np.arange(23), ranked(row)[:9]), row, -INF)
        row = np.where(np.isin(np.arange(23), list(oracle_top_p(row, 0.8))), row, -INF)
        row = np.where(softmax(row) >= 0.1 * softmax(row).max(), row, -INF)
        np.testing.assert_allclose(softmax(got), softmax(row), atol=1e-6)


def test_draws_have_the_filtered_probabilities():
    options = SamplingOptions(temperature=1.3, top_k=6, top_p=0.95)
    logits = random_logits(rows=1, vocab=11, seed=4)
    n = 20_000
    keys = row_keys(jax.random.key(0), jnp.arange(n), jnp.zeros(n, jnp.int32))
    drawn = np.asarray(jax.jit(lambda x, k: sample(x, options, k))(jnp.tile(logits, (n, 1)), keys))
    share = np.bincount(drawn, minlength=11) / n
    # Six standard errors of a share: sqrt(0.25 / n) is 0.0035.
    np.testing.assert_allclose(share, softmax(np.asarray(filtered(jnp.array(logits), options))[0]), atol=0.021)
    assert set(np.flatnonzero(share)) <= kept(filtered(jnp.array(logits), options))[0]


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(top_k=1), SamplingOptions(top_p=1e-9),
                                     SamplingOptions(temperature=1e-6), SamplingOptions(min_p=1.0)])
def test_the_limits_of_every_option_are_greedy(options):
    logits = random_logits(seed=5)
    keys = row_keys(jax.random.key(1), jnp.arange(5), jnp.arange(5))
    np.testing.assert_array_equal(sample(jnp.array(logits), options, keys), logits.argmax(-1))


def test_greedy_with_a_penalty_takes_the_best_after_the_penalty():
    logits, seen = jnp.array([[3.0, 2.0, 1.0]]), jnp.array([[True, False, False]])
    out = sample(logits, SamplingOptions(temperature=0, repetition_penalty=2.0), row_keys(
        jax.random.key(0), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)), seen)
    assert out.tolist() == [1]


@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(temperature=50.0), SamplingOptions(top_k=99),
                                     SamplingOptions(top_p=0.999999), SamplingOptions(min_p=0.0)])
def test_padding_of_the_vocabulary_is_never_drawn(options):
    logits = np.full((512, 16), -INF, np.float32)
    logits[:, :3] = random_logits(512, 3, seed=6)
    keys = row_keys(jax.random.key(2), jnp.arange(512), jnp.zeros(512, jnp.int32))
    drawn = np.asarray(sample(jnp.array(logits), options, keys))
    assert drawn.max() < 3 and len(set(drawn.tolist())) == 3


def test_large_logits_at_a_small_temperature_stay_finite():
    out = np.asarray(filtered(jnp.array([[3e38, 2e38, -3e38]]), SamplingOptions(temperature=1e-3, top_p=0.9)))
    assert out[0, 0] == 0 and not np.isnan(out).any()


def test_a_row_draws_the_same_whatever_is_beside_it():
    options, key = SamplingOptions(temperature=1.5), jax.random.key(3)
    logits = random_logits(rows=6, seed=7)
    rows, positions = jnp.arange(6, dtype=jnp.int32), jnp.array([4, 0, 9, 4, 4, 1], jnp.int32)
    together = np.asarray(sample(jnp.array(logits), options, row_keys(key, rows, positions)))
    for n in range(6):
        alone = sample(jnp.array(logits[n:n + 1]), options, row_keys(key, rows[n:n + 1], positions[n:n + 1]))
        assert alone.tolist() == [together[n]]


def test_keys_differ_by_seed_row_and_position():
    pairs = [(s, r, p) for s in range(3) for r in range(3) for p in range(3)]
    data = {tuple(jax.random.key_data(row_keys(jax.random.key(s), jnp.array([r]), jnp.array([p])))[0].tolist())
            for s, r, p in pairs}
    assert len(data) == len(pairs)


@pytest.mark.parametrize(("field", "value"), [("temperature", -0.1), ("temperature", float("nan")), ("top_k", 0),
                                              ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 2.0),
                                              ("repetition_penalty", 0.0)])
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}=.*must be"):
        SamplingOptions(**{field: value}).check()


def test_a_penalty_without_the_tokens_so_far_is_refused():
    with pytest.raises(ValueError, match="needs `seen`"):
        filtered(jnp.zeros((1, 3)), SamplingOptions(repetition_penalty=1.2))
