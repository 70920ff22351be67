"""Evaluation of pairs and of written responses against loops in numpy."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "tasks"))
from preference_rows import VOCAB, draw_pairs, rows_of, table_apply, table_logp, table_params

from lm.core.batch import ReferencedBatch
from lm.core.types import Head, Output
from lm.eval.preference import Preference, interval
from lm.eval.sets import EvalSet
from lm.eval.win_rate import LogProbability, chosen_of, end_tokens, win_rate
from lm.losses.preference import Dpo, Kto, Orpo
from lm.losses.preference import reference as reference_module
from lm.losses.preference.reference import REFERENCE, divergence, split_reference

GROUPS = draw_pairs(0, 7)
BATCHES = [rows_of([GROUPS[:3], GROUPS[3:5]], 60), rows_of([GROUPS[5:], []], 60)]
PAIRS = {"pairs": EvalSet(lambda: iter(BATCHES))}


def summed(params, prompt, response):
    """Summed log-probability of a response, one token after the other."""
    stream = [*prompt, *response]
    return sum(float(table_logp(params, np.array(stream[i - 1]), np.array(stream[i])))
               for i in range(len(prompt), len(stream)))


def test_metrics_equal_a_loop_over_pairs():
    params, other = table_params(), table_params(1)
    found = {name.removeprefix("eval/pairs/"): value
             for name, value in Preference(PAIRS, Dpo())(table_apply, {**params, REFERENCE: other})}
    ratios = [[summed(params, *g[k]) - summed(other, *g[k]) for k in (0, 1)] for g in GROUPS]
    assert found["accuracy"] == pytest.approx(np.mean([a > b for a, b in ratios]))
    assert found["reward_margin"] == pytest.approx(0.1 * np.mean([a - b for a, b in ratios]), rel=1e-4)
    lengths = [[len(g[k][1]) for k in (0, 1)] for g in GROUPS]
    longer = np.mean([(np.sign(a - b) + 1) / 2 for a, b in lengths])
    assert found["longer_wins"] == longer and found["length_baseline"] == max(longer, 1 - longer)
    means = [[summed(params, *g[k]) / len(g[k][1]) for k in (0, 1)] for g in GROUPS]
    assert found["chosen_logp"] == pytest.approx(np.mean([a for a, _ in means]), rel=1e-5)
    assert found["logp_accuracy"] == pytest.approx(np.mean([a > b for a, b in means]))
    total = -sum(summed(params, *g[0]) for g in GROUPS) / sum(len(g[0][1]) for g in GROUPS)
    assert found["loss"] == pytest.approx(total, rel=1e-5) and found["pairs"] == 7 and found["nonfinite_pairs"] == 0
    # Without a reference a loss that needs one is judged by mean log-probabilities.
    plain = dict(Preference(PAIRS, Dpo())(table_apply, params))
    assert plain["eval/pairs/accuracy"] == plain["eval/pairs/logp_accuracy"] and "eval/pairs/kl" not in plain


def test_divergence_equals_a_sum_over_the_vocabulary(monkeypatch):
    rng = np.random.default_rng(0)
    make = lambda: Output(jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32),
                          Head(jnp.asarray(rng.normal(size=(12, 4)), jnp.float32), None, VOCAB, None), (), {})
    one, two = make(), make()
    logp = [np.asarray(jax.nn.log_softmax(jnp.einsum("btd,vd->btv", o.hidden, o.head.kernel)[..., :VOCAB]))
            for o in (one, two)]
    right = (np.exp(logp[0]) * (logp[0] - logp[1])).sum(-1)
    np.testing.assert_allclose(divergence(one, two), right, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(reference_module, "CHUNK_ELEMENTS", 48)  # two positions at a time
    np.testing.assert_allclose(divergence(one, two), right, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(divergence(one, one), 0, atol=1e-6)


def test_the_reference_is_a_copy_beside_the_variables_or_the_model_without_adapters():
    assert split_reference({"params": 1}) == ({"params": 1}, None)
    assert split_reference({"params": 1, "lora": 2}) == ({"params": 1, "lora": 2}, {"params": 1})
    assert split_reference({"params": 1, "lora": 2, "reference": 3}) == ({"params": 1, "lora": 2}, 3)


def test_a_batch_may_bring_the_references_log_probabilities():
    params, other = table_params(), table_params(1)
    brought = EvalSet(lambda: (ReferencedBatch(*b, table_logp(other, b.tokens, b.targets).astype(np.float32))
                               for b in BATCHES))
    found = dict(Preference({"pairs": brought}, Dpo())(table_apply, params))
    right = dict(Preference(PAIRS, Dpo())(table_apply, {**params, REFERENCE: other}))
    for name in ("accuracy", "reward_margin", "log_ratio"):
        assert found[f"eval/pairs/{name}"] == pytest.approx(right[f"eval/pairs/{name}"], rel=1e-4)


def test_pairs_that_are_not_finite_are_counted_and_wrong():
    params, read = table_params()["params"], int(GROUPS[0][0][0][-1])  # the last token of a prompt
    broken = {"params": {**params, "table": params["table"].at[read].set(np.nan)}}
    found = dict(Preference(PAIRS, Orpo())(table_apply, broken))
    assert found["eval/pairs/nonfinite_pairs"] >= 1 and found["eval/pairs/accuracy"] <= 6 / 7


def test_interval_of_a_share():
    """Wilson's, at values of the literature: 0 of 10 and 5 of 10."""
    assert interval(0.0, 10) == (pytest.approx(0.0, abs=1e-9), pytest.approx(0.2775, abs=1e-3))
    low, high = interval(0.5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-3), pytest.approx(0.7634, abs=1e-3))


def test_responses_that_stand_alone_are_measured_a_side():
    """Every second group keeps its chosen response, the others their rejected one: what KTO learns from."""
    params, other = table_params(), table_params(1)
    alone = [{n % 2: group[n % 2]} for n, group in enumerate(GROUPS)]
    rows = [rows_of([alone[:3], alone[3:5]], 60), rows_of([alone[5:], []], 60)]
    single = {"pairs": EvalSet(lambda: iter(rows))}
    found = {name.removeprefix("eval/pairs/"): value
             for name, value in Preference(single, Kto())(table_apply, {**params, REFERENCE: other})}
    ratio = [summed(params, *group[n % 2]) - summed(other, *group[n % 2]) for n, group in enumerate(GROUPS)]
    good, bad = ratio[::2], ratio[1::2]
    assert found["reward_margin"] == pytest.approx(0.1 * (np.mean(good) - np.mean(bad)), rel=1e-4)
    assert found["reward_auc"] == pytest.approx(np.mean([a > b for a in good for b in bad]))
    lengths = [len(group[n % 2][1]) for n, group in enumerate(GROUPS)]
    assert found["chosen_length"] == np.mean(lengths[::2]) and found["rejected_length"] == np.mean(lengths[1::2])
    assert found["pairs"] == 0 and "accuracy" not in found and np.isfinite(found["loss"])
    bad_alone = {"bad": EvalSet(lambda: iter([rows_of([[{1: ([1], [2])}]], 8)]))}
    found = dict(Preference(bad_alone, Kto())(table_apply, {**params, REFERENCE: other}))
    assert "eval/bad/loss" not in found and "eval/bad/reward_auc" not in found and "eval/bad/rejected_logp" in found


def test_a_set_without_responses_is_refused():
    empty = {"none": EvalSet(lambda: iter([rows_of([[]], 8)]))}
    with pytest.raises(ValueError, match="holds no chosen or rejected response"):
        dict(Preference(empty, Orpo())(table_apply, table_params()))


def test_prompts_and_responses_are_read_back_from_rows():
    found = chosen_of(iter(BATCHES), 100)
    assert [(list(p), list(r)) for p, r in found] == [(list(g[0][0]), list(g[0][1])) for g in GROUPS]
    assert len(chosen_of(iter(BATCHES), 2)) == 2
    ended = [(p, np.append(r, 3)) for p, r in found]
    assert end_tokens(ended) == (3,) and end_tokens([([1], [2]), ([1], [3]), ([1], [4])]) == ()


def test_a_judge_by_log_probability_is_the_mean_over_the_response():
    params = table_params()
    written = [(np.asarray(g[k][0]), np.asarray(g[k][1])) for g in GROUPS for k in (0, 1)]
    found = LogProbability(table_apply, params, batch_size=4)(written)
    np.testing.assert_allclose(found, [summed(params, *w) / len(w[1]) for w in written], rtol=1e-4)


def test_win_rates_stand_beside_those_of_length_alone():
    prompts = [np.array([i]) for i in range(4)]
    ours, theirs = ([np.zeros(n, int) for n in lengths] for lengths in ((3, 1, 2, 5), (1, 3, 2, 2)))
    longest = lambda written: np.array([len(r) for _, r in written], float)
    found = win_rate(prompts, ours, theirs, longest)
    assert found["win_rate"] == found["length_win_rate"] == (1 + 0 + 0.5 + 1) / 4
    assert found["win_rate_of_longer"] == 1 and found["length"] == 2.75 and found["prompts"] == 4
    shortest = win_rate(prompts, ours, theirs, lambda written: -longest(written))
    assert shortest["win_rate"] == 0.375 and shortest["win_rate_of_longer"] == 0
    assert win_rate(prompts, ours, ours, longest)["win_rate"] == 0.5
