"""Pairs whose log-probabilities are not finite: found, left out exactly or refused, and told with their places."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from preference_rows import VOCAB, draw_pairs, rows_of, table_apply, table_params

from launch.preference import MESSAGES, telling
from lm.core.batch import ReferencedBatch
from lm.core.sharding import make_mesh
from lm.core.types import UNSCORED, Head, Output
from lm.eval.preference import Preference
from lm.eval.sets import EvalSet
from lm.losses.preference import Dpo, Orpo
from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions
from lm.tasks.build import build_objective
from lm.train.state import Recipe
from lm.train.step import make_train_step
from lm.train.unscored import COUNT, Unscored, marked_here

T = 60
BAD = VOCAB - 1  # a token that only one pair has


def pairs(where: int | None, side: int, mismatched: bool = False):
    """Six groups without BAD, but for one that begins its response of `side` with it; its place is `where`."""
    groups = draw_pairs(3, 6, mismatched=mismatched, longest=3)
    groups = [{kind: tuple(np.minimum(ids, BAD - 1) for ids in two) for kind, two in group.items()} for group in groups]
    if where is not None:
        prompt, response = groups[where][side]
        groups[where][side] = prompt, np.concatenate([[BAD], response])
    return groups


def broken_table(params):
    """What reads BAD has a hidden state that is not a number."""
    return {"params": {**params["params"], "table": params["params"]["table"].at[BAD].set(jnp.nan)}}


def impossible(params, tokens, state=None, **_):
    """A head that gives BAD the probability 0, so that all else stays finite."""
    out = table_apply(params, tokens)
    bias = jnp.where(jnp.arange(VOCAB) == BAD, -jnp.inf, 0.0)
    return Output(out.hidden, Head(out.head.kernel, bias, VOCAB, None), (), {})


def step(loss, params, batch, *, apply=table_apply, skip=True, microbatches=1):
    """(state after it, its metrics) of one step of SGD."""
    optimizer = build_optimizer(OptimizerOptions(name="sgd", learning_rate=0.5, schedule="constant", warmup_steps=0,
                                                 clip_norm=None), params, 10)
    state = Recipe(lambda key: params, None, optimizer, lambda: table_params(1) if "dpo" in loss or "kto" in loss
                   else ()).fresh(0)
    return jax.jit(make_train_step(apply, build_objective(loss), optimizer, microbatches=microbatches,
                                   skip_nonfinite=skip, per_microbatch=True))(state, batch)


@pytest.mark.parametrize("loss, side, microbatches, apply", [
    ({"orpo": dict(sft_tokens="all")}, 0, 1, table_apply), ({"orpo": 1.0}, 1, 2, impossible),
    ({"dpo": 1.0, "next_token": 0.3}, 1, 2, table_apply), ({"kto": 1.0}, 2, 1, table_apply)])
def test_a_step_is_that_of_the_batch_without_them(loss, side, microbatches, apply):
    """Whether a hidden state or a log-probability alone is not finite; the others of its row and batch stay."""
    groups = pairs(3, side, mismatched="kto" in loss)
    packed = lambda groups: rows_of([groups[:2], groups[2:5], groups[5:], []], T)
    given = packed(groups)
    groups[3] = {}
    params = table_params()
    broken = broken_table(params) if apply is table_apply else params
    state, report = step(loss, broken, given, apply=apply, microbatches=microbatches)
    right, same = step(loss, params, packed(groups), apply=apply, microbatches=microbatches)
    assert np.argwhere(report[UNSCORED]).tolist() == [[1, 1]] and float(report[COUNT]) == 1
    assert not np.any(same[UNSCORED]) and float(same[COUNT]) == 0
    assert int(state.skipped) == int(state.skips) == 0 and int(state.bad_step) == -1
    for name in ("train/loss", "train/grad_norm", "train/chosen_logp", "train/pairs", "train/pair_accuracy"):
        np.testing.assert_allclose(report[name], same[name], rtol=1e-5)
    for a, b, before in zip(*(jax.tree.leaves(one) for one in (state.params, right.params, params)), strict=True):
        np.testing.assert_allclose(a[:BAD], b[:BAD], rtol=1e-5, atol=1e-7)
        assert float(jnp.abs(a[:BAD] - before[:BAD]).max()) > 1e-4


def test_they_end_a_run_that_stops_even_where_the_loss_is_finite():
    """The hinge of a rejected response that cannot be is 0, and so is its gradient: it would pass unseen."""
    params, batch = table_params(), rows_of([pairs(2, 1)[:3], pairs(None, 0)[3:]], T)
    batch = ReferencedBatch(*batch, np.full(batch.tokens.shape, -1.0, np.float32))
    after, report = step({"slic": dict(beta=0.1), "reference": "cached"}, params, batch, apply=impossible, skip=False)
    assert np.isfinite(report["train/loss"]) and np.isfinite(report["train/grad_norm"])
    assert int(after.bad_step) == 0 and np.argwhere(report[UNSCORED]).tolist() == [[0, 2]]
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_where_nothing_would_remain_the_update_is_left_out():
    """Else a model that scores nothing would go on, with gradients of 0."""
    batch = rows_of([pairs(3, 0)[3:4], pairs(5, 1)[5:]], T)
    after, report = step({"orpo": 1.0}, table_params(), batch, apply=impossible)
    assert float(report[COUNT]) == 2 and int(after.skips) == 1 and int(after.skipped) == 1


def test_a_reference_that_is_not_finite_marks_the_pair():
    batch = rows_of([pairs(None, 0)], T)
    reference = np.full(batch.tokens.shape, -1.0, np.float32)
    reference[0, np.flatnonzero((batch.segment_ids[0] == 3 * 4 + 2) & (batch.weights[0] > 0))[0]] = -np.inf
    _, report = step({"dpo": 1.0, "reference": "cached"}, table_params(), ReferencedBatch(*batch, reference))
    assert np.argwhere(report[UNSCORED]).tolist() == [[0, 4]] and np.isfinite(report["train/loss"])


def test_every_process_tells_of_its_own_rows_once():
    """Eight devices stand for as many processes: rows on four of them, each twice."""
    marks = np.zeros((8, 5), bool)
    marks[0, 4] = marks[3, 1] = marks[7, 0] = True
    mesh = make_mesh({"data": 4, "tensor": 2})
    split = jax.device_put(marks, NamedSharding(mesh, PartitionSpec("data", None)))
    assert marked_here(split) == [(0, 4), (3, 1), (7, 0)]
    shards = [[shard for shard in split.addressable_shards if shard.device.id in pair] for pair in ((0, 1), (6, 7))]
    told = [marked_here(type("Here", (), {"addressable_shards": some, "shape": marks.shape})) for some in shards]
    assert told == [[(0, 4)], [(7, 0)]]
    heard = []
    watched = Unscored(lambda *given: heard.append(given))
    for number in (1, 2, 3):
        watched.took(number, {COUNT: np.float32(number == 2), UNSCORED: split})
    watched.finished(1)
    assert heard == []
    watched.finished(3)
    assert heard == [(2, [(0, 4), (3, 1), (7, 0)])]


def test_lines_are_named_up_to_a_bound_and_counted_beyond(caplog):
    place = lambda self, step, row, group: f"pairs.jsonl:{100 * step + 10 * row + group}"
    tell = telling(type("Data", (), {"place": place})(), "skip")
    with caplog.at_level(logging.WARNING):
        tell(3, [(0, 1), (1, 2)])
        assert "step 3: 2 of the pairs" in caplog.text and "left out: pairs.jsonl:201, pairs.jsonl:212" in caplog.text
        tell(4, [(row, 0) for row in range(9)])
        assert "pairs.jsonl:340 and 4 others; 11 in 2 steps so far" in caplog.text and ":350" not in caplog.text
        for number in range(5, 100):
            tell(number, [(0, 0)])
    assert len(caplog.records) < MESSAGES + 5 and "in 64 steps so far" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("loss", [Orpo(), Dpo()])
def test_an_evaluation_names_them_and_its_means_are_those_of_the_others(loss, caplog):
    """The second batch's first row; with a reference that is not finite as with a model that is not."""
    groups, params = pairs(4, 1), table_params()
    sets = lambda last: EvalSet(lambda: [rows_of([groups[:2], groups[2:4]], T), rows_of([last, groups[5:]], T)],
                                places=lambda row: [f"pairs.jsonl:{10 * row + group}" for group in range(9)])
    given = {**params, "reference": broken_table(params)} if isinstance(loss, Dpo) else broken_table(params)
    whole = {**params, "reference": params} if isinstance(loss, Dpo) else params
    with caplog.at_level(logging.WARNING):
        found = dict(Preference({"held": sets([groups[4]])}, loss)(table_apply, given))
    right = dict(Preference({"held": sets([{}])}, loss)(table_apply, whole))
    assert "held: 1 of the pairs" in caplog.text and "pairs.jsonl:20" in caplog.text
    assert found["eval/held/nonfinite_pairs"] == 1 and found["eval/held/pairs"] == 6
    assert found["eval/held/accuracy"] == pytest.approx(right["eval/held/accuracy"] * 5 / 6)
    for name in ("loss", "chosen_logp", "rejected_logp", "reward_margin", "log_odds_ratio"):
        assert found[f"eval/held/{name}"] == pytest.approx(right[f"eval/held/{name}"], rel=1e-5, abs=1e-7)
    with pytest.raises(ValueError, match=r"1 of the pairs have log-probabilities that are not finite: pairs\.jsonl:20"):
        dict(Preference({"held": sets([groups[4]])}, loss, on_nonfinite="refuse")(table_apply, given))
