"""A train step under a goldfish mask: what it minimises, what it reports, and that nothing else about the run shows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import ADAMW, MODEL, SGD, VOCAB, B, losses, make_recipe, packed_batch
from tiny_experiment import get_config

from launch import config as configs
from launch.train import prepare
from lm.core.batch import Batch, MaskedBatch
from lm.core.goldfish import Goldfish, dropped, masked
from lm.core.goldfish_sharded import dropped_over_shards
from lm.core.head import logits_of
from lm.core.sharding import make_mesh
from lm.data.loader import build_dataset, iterate
from lm.losses.cross_entropy import scores_of
from lm.models.build import build_model, make_apply
from lm.tasks.build import build_objective
from lm.tasks.language_modeling import forward, score_batch
from lm.train.step import make_train_step

GOLDFISH = Goldfish(k=3, h=4)


def mask_of(options=GOLDFISH):
    return lambda batch, step: masked(options, batch, step.astype(jnp.uint32) * jnp.uint32(B), dropped_over_shards)


@functools.cache
def model_and_state():
    model = build_model(MODEL, VOCAB)
    recipe = make_recipe(model, ADAMW)
    return make_apply(model), recipe, recipe.create(0, make_mesh({"data": 1}, devices=jax.devices()[:1]))


def one_step(mask, batch, **options):
    apply, recipe, state = model_and_state()
    step = jax.jit(make_train_step(apply, build_objective({"next_token": 1.0}), recipe.optimizer, mask=mask, **options))
    return {name: float(value) for name, value in step(state, batch)[1].items()}


def test_the_loss_is_the_mean_over_kept_targets_and_both_kinds_are_reported():
    batch = packed_batch(0)
    apply, _, state = model_and_state()
    nats = -np.asarray(score_batch(jax.jit(apply), state.params, jax.tree.map(jnp.asarray, batch)).logp, np.float64)
    drop = dropped(GOLDFISH, batch)
    kept, hidden = batch.weights * ~drop, batch.weights * drop
    found = one_step(mask_of(), batch)
    np.testing.assert_allclose(found["train/loss"], (nats * kept).sum() / kept.sum(), rtol=1e-5)
    np.testing.assert_allclose(found["train/goldfish_kept"], found["train/next_token"], rtol=1e-6)
    np.testing.assert_allclose(found["train/goldfish_dropped"], (nats * hidden).sum() / hidden.sum(), rtol=1e-5)
    np.testing.assert_allclose(found["train/goldfish_share"], hidden.sum() / batch.weights.sum(), rtol=1e-6)
    assert hidden.sum() > 5
    assert not any("goldfish" in name for name in one_step(None, batch))


def test_gradient_by_the_logits_of_dropped_targets_is_exactly_zero():
    batch = masked(GOLDFISH, packed_batch(0))
    apply, _, state = model_and_state()
    out = jax.jit(lambda: forward(apply, state.params, Batch(*map(jnp.asarray, batch[:5]))))()

    def loss(logits):
        return jnp.sum(-scores_of(logits, jnp.asarray(batch.targets)).logp * batch.weights) / batch.weights.sum()
    gradient = np.asarray(jax.jit(jax.grad(loss))(logits_of(out.hidden, out.head)))
    assert (gradient[batch.dropped > 0] == 0).all() and (np.abs(gradient[batch.weights > 0]).max(axis=-1) > 0).all()


def test_microbatches_give_the_gradient_of_the_whole():
    """Kept targets are divided by their number in the whole batch, and rows keep their numbers."""
    mask = mask_of(Goldfish(mask="random", k=3))
    one, four = (losses(optimizer=SGD, steps=3, mask=mask, microbatches=n) for n in (1, 4))
    np.testing.assert_allclose(four, one, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(context=4), dict(data=2, fsdp=2, context=2)], ids=str)
def test_sequence_sharding_changes_nothing(mesh):
    size = int(np.prod(list(mesh.values())))
    want = losses(optimizer=SGD, steps=3, mask=mask_of())
    found = losses(optimizer=SGD, steps=3, mask=mask_of(), mesh=mesh, devices=jax.devices()[:size])
    np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [Goldfish(mask="random", k=3), GOLDFISH], ids=["random", "hash"])
def test_masks_made_with_the_data_give_the_same_run(options):
    """Up to rounding: the masks are equal to the bit, the two programs are not."""
    here = losses(steps=3, mask=mask_of(options))
    there = losses(steps=3, batch_of=lambda n: masked(options, packed_batch(n), n * B))
    np.testing.assert_allclose(here, there, rtol=1e-6)


@pytest.mark.slow
def test_large_k_is_the_run_without_a_mask():
    np.testing.assert_array_equal(losses(steps=3, mask=mask_of(Goldfish(k=2**31 - 1, h=2))), losses(steps=3))


def test_masked_prompts_stay_masked():
    """Weights of 0, as of an SFT prompt, stay 0; others are kept or move to `dropped`, fractions too."""
    batch = packed_batch(0)
    half = batch._replace(weights=batch.weights * np.where(np.arange(16) < 8, 0.0, 0.5).astype(np.float32))
    out = masked(GOLDFISH, half)
    assert (out.weights[:, :8] == 0).all() and (out.dropped[:, :8] == 0).all() and (out.dropped == 0.5).any()


def config_of(**goldfish):
    config = get_config().to_dict()
    return configs.resolve({**config, "loss": {"goldfish": goldfish}}, [])


def test_a_config_puts_the_mask_where_it_says():
    on_device, with_data = prepare(config_of(k=3, h=4)), prepare(config_of(k=3, h=4, where="data"))
    plain, mask = on_device.train_set.batch(5), on_device.mask()
    made = with_data.train_set.batch(5)
    assert isinstance(plain, Batch) and isinstance(made, MaskedBatch) and with_data.mask() is None
    for ours, theirs in zip(jax.jit(mask)(plain, jnp.int32(5)), made, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert made.dropped.any()
    (step, ahead), = [next(iterate(with_data.train_set, 5, num_threads=0))]
    assert step == 5
    np.testing.assert_array_equal(ahead.dropped, made.dropped)


def test_evaluation_is_never_masked():
    run = prepare(config_of(k=2, h=1, where="data"))
    held_out = build_dataset(configs.options(run.config, "data"), split="validation", batch_size=8, seq_len=32,
                             goldfish=Goldfish(k=2, h=1))
    assert all(isinstance(batch, Batch) for batch in held_out.eval_batches())
    assert all(isinstance(batch, Batch) for batch in run.train_set.eval_batches(2))


@pytest.mark.parametrize("loss, message", [
    (dict(goldfish=dict(kk=4)), "no field 'kk'.*did you mean 'k'"), (dict(goldfish=0.5), "is a mask, not a loss"),
    (dict(goldfish=dict(k=0)), "config.loss.goldfish.k=0"), (dict(goldfish=dict(mask="hashed")), "'hash'"),
    (dict(goldfish={}, dpo=1.0), "needs every token of a response"),
    (dict(goldfisch=dict(k=4)), "did you mean 'goldfish'"), (dict(goldfish=dict(k=2.5)), "must be int")])
def test_wrong_fields_are_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        configs.resolve({**get_config().to_dict(), "loss": loss}, [])


def test_the_mask_leaves_the_default_loss_and_can_be_overridden():
    assert config_of().loss.next_token == 1.0 and config_of().loss.goldfish.k == 4
    config = configs.resolve(get_config(), [("loss.goldfish.k", "8"), ("loss.goldfish.mask", "static")])
    assert (config.loss.goldfish.k, config.loss.goldfish.mask, config.loss.goldfish.h) == (8, "static", 13)
    off = configs.resolve({**get_config().to_dict(), "loss": dict(goldfish=dict(k=8))}, [("loss.goldfish", "None")])
    assert "goldfish" not in off.loss and off.loss.next_token == 1.0
    with pytest.raises(ValueError, match=r"train\.seq_len of at least 39, and it is 32"):
        prepare(config_of(h=40))
