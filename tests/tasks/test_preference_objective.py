"""The preference objective: loops over responses as oracle, exact accumulation, packing, meshes and references."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_rows import VOCAB, draw_pairs, rows_of, table_apply, table_logp, table_params

from lm.core.batch import Batch
from lm.core.sharding import make_mesh
from lm.core.types import UNSCORED
from lm.losses.preference.responses import groups_of, sums, supervised
from lm.models.build import build_model, init_params, make_apply
from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions
from lm.tasks.build import build_objective, resolve_loss
from lm.tasks.language_modeling import LanguageModeling
from lm.tasks.preference import PreferenceObjective
from lm.train.state import Recipe
from lm.train.step import make_train_step

NAMES = ("orpo", "dpo", "ipo", "simpo", "cpo", "slic", "kto")
T = 24


@functools.cache
def batch_of(seed=0, rows=8):
    groups = draw_pairs(seed, rows, mismatched=True, longest=3)
    return rows_of([[g] for g in groups], T)


def loss_and_gradient(objective, params, batch, carry=(), apply=table_apply):
    """(what a train step minimises, its gradient, metrics)."""
    def total(params):
        means, _, metrics = objective(apply, params, carry, batch, None)
        values = {name: value for name, value in metrics.items() if name != UNSCORED}
        return sum(objective.weights[n] * m.value for n, m in means.items()), {**means, **values}
    (value, found), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return value, grads, {name: mean.value for name, mean in found.items()}


def test_sums_of_segments_equal_a_loop():
    batch = batch_of()
    logp = np.random.default_rng(1).normal(size=batch.tokens.shape).astype(np.float32)
    found = jax.jit(sums)(logp, batch.segment_ids)
    for row in range(len(logp)):
        for segment in range(1, 3 * T + 1):
            inside = batch.segment_ids[row] == segment
            right = sum(float(v) for v, here in zip(logp[row], inside, strict=True) if here)
            assert float(found[row, (segment - 1) // 3, (segment - 1) % 3]) == pytest.approx(right, abs=1e-5)


def test_scores_of_responses_equal_a_loop_over_documents():
    """The prompt does not count, and neither does what stands in the padding."""
    groups = draw_pairs(3, 4)
    params, batch = table_params(), rows_of([groups[:2], groups[2:]], 40)
    logp = np.where(batch.weights > 0, table_logp(params, batch.tokens, batch.targets), np.nan)
    found = groups_of(jnp.asarray(logp, jnp.float32), None, batch)
    for n, group in enumerate(groups):
        for kind, side in ((0, found.chosen), (1, found.rejected)):
            prompt, response = group[kind]
            stream, total = [*prompt, *response], 0.0
            for i in range(len(prompt), len(stream)):
                total += float(table_logp(params, np.array(stream[i - 1]), np.array(stream[i])))
            assert float(side.logp[n // 2, n % 2]) == pytest.approx(total, rel=1e-5)
            assert float(side.length[n // 2, n % 2]) == len(response)
    assert int(found.paired.sum()) == 4 and not bool(found.mismatched.present.any())


@pytest.mark.parametrize("tokens", ["response", "all"])
@pytest.mark.parametrize("average", ["tokens", "sequences"])
def test_likelihood_of_orpo_equals_a_loop(tokens, average):
    groups = draw_pairs(4, 4)
    params, batch = table_params(), rows_of([groups[:2], groups[2:]], 40)
    objective = build_objective({"orpo": dict(odds_weight=0.0, sft_tokens=tokens, sft_average=average)})
    each = []
    for group in groups:
        prompt, response = group[0]
        stream = np.array([*prompt, *response])
        first = 1 if tokens == "all" else len(prompt)
        each.append([-float(table_logp(params, stream[i - 1], stream[i])) for i in range(first, len(stream))])
    flat = [x for one in each for x in one]
    right = sum(flat) / len(flat) if average == "tokens" else sum(sum(e) / len(e) for e in each) / len(each)
    value, _, metrics = loss_and_gradient(objective, params, batch)
    assert float(value) == pytest.approx(right, rel=1e-5) and float(metrics["nll"]) == pytest.approx(right, rel=1e-5)


def test_orpo_without_odds_is_supervised_fine_tuning():
    batch, params = batch_of(), table_params()
    sft = batch._replace(weights=np.asarray(supervised(batch, "response")))
    value, grads, _ = loss_and_gradient(build_objective({"orpo": dict(odds_weight=0.0)}), params, batch)
    right, wanted, _ = loss_and_gradient(build_objective({"next_token": 1.0}), params, sft)
    np.testing.assert_allclose(value, right, rtol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (grads, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_orpo_weighs_every_token_as_the_closed_form_says():
    """d loss / d log p_t: -1/N - lambda c_w / (B m_w) on chosen tokens, lambda c_l / (B m_l) on rejected ones."""
    groups = draw_pairs(5, 6)
    batch, lam = rows_of([groups[:3], groups[3:]], 60), 0.7
    logp = jnp.asarray(-np.random.default_rng(0).exponential(1.0, batch.tokens.shape), jnp.float32)
    objective = build_objective({"orpo": dict(odds_weight=lam)})

    def total(logp):
        scored = groups_of(logp, None, batch)
        counts = objective.counts(batch)
        odds = jnp.sum(jnp.where(objective.loss.counted(scored), objective.loss(scored), 0)) / counts["orpo"]
        return lam * odds + objective._likelihood(logp, supervised(batch, "response"), batch).value

    found = jax.grad(total)(logp)
    count = float((np.asarray(supervised(batch, "response"))).sum())
    for row in range(2):
        for g in range(3):
            inside = [(batch.segment_ids[row] == 3 * g + k + 1) & (batch.weights[row] > 0) for k in (0, 1)]
            p, q = (math.exp(float(np.asarray(logp)[row][here].mean())) for here in inside)
            d = p + q - 2 * p * q
            for here, right in ((inside[0], -1 / count - lam * q / d / (6 * inside[0].sum())),
                                (inside[1], lam * q * (1 - p) / ((1 - q) * d) / (6 * inside[1].sum()))):
                np.testing.assert_allclose(found[row][here], right, rtol=1e-4)
    np.testing.assert_array_equal(found[batch.weights == 0], 0)


def step(loss, params, batch, microbatches=1, carry=(), **options):
    objective = build_objective(loss)
    optimizer = build_optimizer(OptimizerOptions(name="sgd", learning_rate=0.5, schedule="constant", warmup_steps=0,
                                                 clip_norm=None), params, 10)
    state = Recipe(lambda key: params, None, optimizer, lambda: carry).fresh(0)
    return jax.jit(make_train_step(table_apply, objective, optimizer, microbatches=microbatches, **options))(
        state, batch)


def slow_but(*quick, without=()):
    """The names of losses, those that are not quick marked as slow tests: they share all that is not a formula."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in NAMES
            if name not in without]


@pytest.mark.parametrize("name", slow_but("orpo", "dpo", without=("kto",)))
def test_four_microbatches_equal_one(name):
    """Rows hold unequal numbers of pairs and of tokens, one of them none."""
    groups = draw_pairs(6, 10, longest=3)
    cuts = [groups[:1], groups[1:3], [], groups[3:4], groups[4:6], groups[6:7], groups[7:9], groups[9:]]
    batch, params, other = rows_of(cuts, T), table_params(), table_params(1)
    loss = {name: dict(weight=0.7), "next_token": 0.3}
    (one, report), (four, same) = (step(loss, params, batch, m, carry=other) for m in (1, 4))
    np.testing.assert_allclose(same["train/loss"], report["train/loss"], rtol=1e-6)
    for metric in ("train/pair_accuracy", "train/log_odds_ratio", "train/chosen_logp"):
        np.testing.assert_allclose(same[metric], report[metric], rtol=1e-5)
    for a, b, before in zip(*map(jax.tree.leaves, (one.params, four.params, params)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
        assert float(jnp.abs(a - before).max()) > 1e-4


def test_kto_is_refused_over_microbatches_unless_asked_for():
    batch, params = batch_of(), table_params()
    with pytest.raises(ValueError, match="kto does not add up over microbatches"):
        step({"kto": 1.0}, params, batch, 2, carry=table_params(1))
    _, report = step({"kto": 1.0}, params, batch, 2, carry=table_params(1), per_microbatch=True)
    assert np.isfinite(report["train/loss"])


@pytest.mark.parametrize("name", slow_but("orpo", "kto"))
def test_packing_and_padding_change_nothing(name):
    groups = draw_pairs(7, 8, mismatched=True, longest=3)
    objective, params, other = build_objective({name: 1.0}), table_params(), table_params(1)
    apart = loss_and_gradient(objective, params, rows_of([[g] for g in groups], T), other)
    wide = loss_and_gradient(objective, params, rows_of([groups[:5], groups[5:]], 5 * T), other)
    for a, b in zip(*map(jax.tree.leaves, (apart, wide)), strict=True):
        if a.size > 1 or float(a) != 8:  # the number of pairs is the same anyway
            np.testing.assert_allclose(b, a, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", slow_but("orpo", "kto"))
def test_a_batch_without_pairs_is_zero(name):
    batch = rows_of([[], []], T)
    value, grads, _ = loss_and_gradient(build_objective({name: 1.0}), table_params(), batch, table_params(1))
    assert float(value) == 0 and all(not bool(jnp.any(g)) for g in jax.tree.leaves(grads))


def test_a_response_without_its_partner_counts_as_likelihood_alone():
    groups = draw_pairs(8, 3)
    del groups[1][1]
    objective, params = build_objective({"orpo": dict(odds_weight=1.0)}), table_params()
    _, _, found = loss_and_gradient(objective, params, rows_of([groups], 60))
    _, _, pairs = loss_and_gradient(objective, params, rows_of([[groups[0], groups[2]]], 60))
    assert float(found["pairs"]) == 2
    np.testing.assert_allclose(found["orpo"], pairs["orpo"], rtol=1e-6)
    assert float(found["nll"]) != pytest.approx(float(pairs["nll"]), rel=1e-4)


# --- References.

class Referenced(Batch):
    """A batch that brings log-probabilities."""


def test_reference_copy_cached_and_adapters_off_are_the_same_number():
    batch, base = batch_of(), table_params()
    lora = {"lora": {"table": 0.1 * jnp.ones_like(base["params"]["table"]) * jnp.arange(6)}}
    adapted = {**base, **lora}
    cached = Referenced(*batch)
    cached.reference = jnp.asarray(table_logp(base, batch.tokens, batch.targets), jnp.float32)
    found = []
    for kind, carry, given in (("copy", base, batch), ("cached", (), cached), ("adapters_off", (), batch)):
        objective = build_objective({"dpo": dict(beta=0.5), "reference": kind})
        means, _, metrics = objective(table_apply, adapted, carry, given, None)
        found.append((means["dpo"].value, metrics["reward_margin"].value, metrics["log_ratio"].value))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-6)
    assert abs(float(found[0][0]) - math.log(2)) > 1e-3


def test_dpo_starts_at_ln_2_and_the_reference_gets_no_gradient():
    batch, params = batch_of(), table_params()
    value, grads, metrics = loss_and_gradient(build_objective({"dpo": 1.0}), params, batch, params)
    assert float(value) == pytest.approx(math.log(2), rel=1e-6)
    assert abs(float(metrics["log_ratio"])) < 1e-6
    objective = build_objective({"dpo": 1.0})
    against = jax.grad(lambda carry: objective(table_apply, params, carry, batch, None)[0]["dpo"].value)(params)
    assert all(not bool(jnp.any(g)) for g in jax.tree.leaves(against))
    assert any(bool(jnp.any(g)) for g in jax.tree.leaves(grads))


def test_cached_reference_that_is_not_there_says_so():
    with pytest.raises(ValueError, match="brings no log-probabilities"):
        build_objective({"dpo": 1.0, "reference": "cached"})(table_apply, table_params(), (), batch_of(), None)


# --- Models, meshes and memory.

RWKV = dict(norm="layer", embed_norm=True, pattern=("rwkv7/channel_mix",), prefix=("first/channel_mix",),
            first=dict(kind="rwkv7", value_residual=False, head_dim=8), rwkv7=dict(head_dim=8),
            channel_mix=dict(version=7))
ATTENTION = dict(pattern=("attention/mlp",), attention=dict(num_heads=2), mlp=dict(mlp_dim=32))


@pytest.mark.slow
@pytest.mark.parametrize("layers", [ATTENTION, RWKV], ids=["attention", "rwkv7"])
def test_documents_of_a_row_do_not_see_each_other(layers):
    """The same pairs packed into one row and each in a row of its own: value and gradient agree."""
    model = build_model(dict(embed_dim=16, num_layers=2, dtype="float32", vocab_multiple=8, **layers), VOCAB)
    params, apply = init_params(model, jax.random.key(0)), make_apply(model)
    groups = draw_pairs(9, 4, longest=4)
    objective = build_objective({"orpo": dict(odds_weight=1.0)})
    apart = loss_and_gradient(objective, params, rows_of([[g] for g in groups], 16), apply=apply)
    packed = loss_and_gradient(objective, params, rows_of([groups], 64), apply=apply)
    np.testing.assert_allclose(packed[0], apart[0], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (apart[1], packed[1])), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_rows_on_a_mesh_equal_one_device():
    model = build_model(dict(embed_dim=16, num_layers=2, dtype="float32", vocab_multiple=8, **ATTENTION), VOCAB)
    params, apply = init_params(model, jax.random.key(0)), make_apply(model)
    other = jax.tree.map(lambda a: a + 0.05, params)
    batch = batch_of(10)
    for name in ("orpo", "dpo", "kto"):
        objective = build_objective({name: 1.0})
        alone = loss_and_gradient(objective, params, batch, other, apply)
        with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
            split = loss_and_gradient(objective, params, batch, other, apply)
        for a, b in zip(*map(jax.tree.leaves, (alone, split)), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


def test_logits_of_all_positions_never_exist():
    """The largest array of the compiled gradient, reference included, is far below [rows, T, V]."""
    rows, length, vocab, width = 2, 64, 1024, 8
    params = {"params": {"table": jax.ShapeDtypeStruct((vocab, width), jnp.float32),
                         "kernel": jax.ShapeDtypeStruct((vocab, width), jnp.float32)}}
    spec = Batch(*(jax.ShapeDtypeStruct((rows, length), kind)
                   for kind in (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)))
    apply = lambda params, tokens, state=None, **_: table_apply(params, tokens)._replace(
        head=table_apply(params, tokens).head._replace(vocab_size=vocab))

    def largest(chunk):
        objective = build_objective({"dpo": 1.0, "next_token": 1.0, "chunk": chunk})
        grad = jax.grad(lambda p, c, b: sum(m.value for m in objective(apply, p, c, b, None)[0].values()))
        text = jax.jit(grad).lower(params, params, spec).compile().as_text()
        shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", text)
        return max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)

    logits = rows * length * vocab
    assert largest(length) >= logits  # the measure sees them where they are
    assert largest(4) <= logits // 4


# --- The config group.

def test_the_group_makes_the_objective():
    made = build_objective({"simpo": dict(beta=3.0), "z_loss": 1e-4})
    assert isinstance(made, PreferenceObjective) and made.loss.beta == 3.0 and dict(made.weights) == {
        "simpo": 1.0, "z_loss": 1e-4}
    assert dict(build_objective({"orpo": dict(weight=2.0)}).weights) == pytest.approx({"orpo": 0.2, "nll": 2.0})
    assert isinstance(build_objective({"next_token": 1.0}), LanguageModeling)
    once = resolve_loss({"dpo": 1.0})
    assert once["reference"] is None and resolve_loss(once) == once and "reference" not in resolve_loss({})


@pytest.mark.parametrize("given, message", [
    ({"dpo": 1.0, "orpo": 1.0}, "one preference loss"), ({"dpoo": 1.0}, "did you mean 'dpo'"),
    ({"dpo": 1.0, "reference": "frozen"}, "copy, cached, adapters_off"),
    ({"next_token": 1.0, "reference": "copy"}, "belongs to a preference loss"),
    ({"dpo": dict(label_smoothing=0.7)}, "label_smoothing"), ({"orpo": dict(sft_tokens="prompt")}, "sft_tokens")])
def test_mistakes_in_the_group_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        resolve_loss(given)
