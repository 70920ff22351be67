"""The train step itself: masks, what happens to a step that is not finite, averages, terms that do not add up."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import ADAMW, MODEL, VOCAB, B, T, losses, make_recipe, packed_batch

from lm.core.batch import Batch
from lm.core.sharding import make_mesh
from lm.models.build import build_model, init_params, make_apply
from lm.tasks.build import build_objective
from lm.tasks.language_modeling import score_batch
from lm.train.step import make_train_step


def test_packed_equals_separate():
    """The mean loss of packed rows is the mean over their documents, each alone in a row of its own."""
    model = build_model(MODEL, VOCAB)
    params, apply = init_params(model, jax.random.key(0)), jax.jit(make_apply(model))
    batch = packed_batch(0)
    together = score_batch(apply, params, jax.tree.map(jnp.asarray, batch)).logp
    checked = 0
    for row in range(B):
        starts = [*np.flatnonzero(batch.positions[row] == 0), T]
        for start, stop in itertools.pairwise(starts):
            if batch.segment_ids[row, start] == 0:
                continue
            width = T  # one shape, so one compilation: the rest of the row is padding
            alone = Batch(*(np.zeros((1, width), leaf.dtype) for leaf in batch))
            for field, leaf in zip(alone, batch, strict=True):
                field[0, :stop - start] = leaf[row, start:stop]
            logp = score_batch(apply, params, alone).logp[0, :stop - start]
            np.testing.assert_allclose(together[row, start:stop], logp, rtol=1e-5, atol=1e-5)
            checked += 1
    assert checked > B


def test_the_first_loss_is_the_weighted_mean_by_hand():
    model = build_model(MODEL, VOCAB)
    recipe = make_recipe(model, ADAMW)
    params = recipe.create(0, make_mesh({"data": 1}, devices=jax.devices()[:1])).params
    batch = packed_batch(0)
    out = make_apply(model)(params, batch.tokens, reset=batch.reset, positions=batch.positions, weights=batch.present)
    logits = np.asarray(out.hidden, np.float64) @ np.asarray(out.head.kernel, np.float64).T
    logits = logits[..., :VOCAB]
    logz = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    total = 0.0
    for row in range(B):
        for t in range(T):
            nll = logz[row, t] - logits[row, t, batch.targets[row, t]]
            total += batch.weights[row, t] * (nll + 1e-3 * logz[row, t] ** 2)
    np.testing.assert_allclose(losses(steps=1)[0], total / batch.weights.sum(), rtol=1e-5)


def runner(optimizer=ADAMW, **options):
    """(state, step function) of a small run on one device; the state is not donated."""
    model = build_model(MODEL, VOCAB)
    recipe = make_recipe(model, optimizer)
    state = recipe.create(0, make_mesh({"data": 1}, devices=jax.devices()[:1]))
    return state, jax.jit(make_train_step(make_apply(model), build_objective({"next_token": 1.0}), recipe.optimizer,
                                          **options))


def poison(batch: Batch) -> Batch:
    weights = batch.weights.copy()
    weights[0, 0] = np.inf
    return batch._replace(weights=weights)


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_a_nonfinite_step_freezes_everything_after_it():
    state, step = runner()
    state, _ = step(state, packed_batch(0))
    kept = arrays((state.params, state.opt_state))
    for n in (1, 2, 3):
        state, metrics = step(state, poison(packed_batch(n)) if n == 1 else packed_batch(n))
        assert int(metrics["train/bad_step"]) == 1
    for a, b in zip(kept, arrays((state.params, state.opt_state)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_nonfinite_step_is_skipped_when_asked():
    state, step = runner(skip_nonfinite=True)
    other, _ = step(state, packed_batch(0))
    bad, metrics = step(other, poison(packed_batch(1)))
    assert int(metrics["train/skips"]) == 1 and int(metrics["train/bad_step"]) == -1
    for a, b in zip(arrays((other.params, other.opt_state)), arrays((bad.params, bad.opt_state)), strict=True):
        np.testing.assert_array_equal(a, b)
    good, metrics = step(bad, packed_batch(2))
    assert int(metrics["train/skips"]) == 0 and int(good.step) == 3
    assert any((a != b).any() for a, b in zip(arrays(bad.params), arrays(good.params), strict=True))


def test_a_batch_without_any_weight_changes_nothing_but_decay():
    state, step = runner(dict(ADAMW, weight_decay=0.0))
    batch = packed_batch(0)
    after, metrics = step(state, batch._replace(weights=np.zeros_like(batch.weights)))
    assert float(metrics["train/loss"]) == 0.0
    for a, b in zip(arrays(state.params), arrays(after.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_average_of_parameters_is_kept():
    state, step = runner(dict(ADAMW, ema_decay=0.5))
    seen = []
    for n in range(3):
        state, _ = step(state, packed_batch(n))
        seen.append(state.params)
    # decay 1/2, debiased: weights 1, 2, 4 of 7.
    want = jax.tree.map(lambda a, b, c: (a + 2 * b + 4 * c) / 7, *seen)
    for a, b in zip(arrays(state.ema), arrays(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_terms_that_do_not_add_up_are_refused_with_microbatches():
    model = build_model(MODEL, VOCAB)
    recipe = make_recipe(model, ADAMW)
    objective = dataclasses.replace(build_objective({}), not_additive=("balance",))
    with pytest.raises(ValueError, match=r"balance does not add up over microbatches.*per_microbatch"):
        make_train_step(make_apply(model), objective, recipe.optimizer, microbatches=2)
    make_train_step(make_apply(model), objective, recipe.optimizer, microbatches=2, per_microbatch=True)
    make_train_step(make_apply(model), objective, recipe.optimizer, microbatches=1)


def test_counts_are_those_of_the_means():
    """`counts(batch)` is a promise about what the objective divides by."""
    model = build_model(MODEL, VOCAB)
    objective = build_objective({"next_token": 1.0, "z_loss": 1e-3})
    batch = packed_batch(3)
    means, _, _ = objective(make_apply(model), init_params(model, jax.random.key(0)), (), batch, None)
    for name, count in objective.counts(batch).items():
        np.testing.assert_allclose(means[name].count, count)


def test_dropout_differs_between_steps_and_repeats_with_the_seed():
    model = dict(attention=dict(num_heads=4, dropout=0.5))
    same = [losses(model=model, steps=3, batch_of=lambda n: packed_batch(0)) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    frozen = dict(name="sgd", learning_rate=1e-12, schedule="constant", warmup_steps=0)
    still = losses(model=model, steps=3, optimizer=frozen, batch_of=lambda n: packed_batch(0))
    assert len(set(still.tolist())) == 3
