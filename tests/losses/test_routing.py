"""Losses of routers as terms of the objective: their values, microbatches, and what is refused."""

import functools

import jax
import numpy as np
import pytest

from lm.core.batch import Batch
from lm.models.build import build_model, init_params, make_apply
from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions
from lm.tasks.build import build_objective, resolve_loss
from lm.train.state import Recipe
from lm.train.step import make_train_step

MODEL = dict(embed_dim=8, num_layers=2, pattern=("mlp/moe",), mlp=dict(mlp_dim=8),
             moe=dict(num_experts=4, top_k=2, mlp_dim=8), dtype="float32", vocab_multiple=1)


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 16, (4, 9)).astype(np.int32)
    present = np.arange(8) < np.array([8, 3, 5, 1])[:, None]
    return Batch(tokens[:, :-1], tokens[:, 1:], present.astype(np.float32), present.astype(np.int32),
                 np.where(present, np.arange(8), 0).astype(np.int32))


@functools.cache
def model_and_params():
    model = build_model(MODEL, 16)
    return model, jax.jit(lambda: init_params(model, jax.random.key(0)))()


def step(loss, microbatches=1, **changes):
    model, params = model_and_params()
    options = OptimizerOptions("sgd", learning_rate=0.1, schedule="constant", warmup_steps=0, clip_norm=None)
    recipe = Recipe(lambda key: params, params, build_optimizer(options, params, 10))
    run = make_train_step(make_apply(model), build_objective(loss), recipe.optimizer, microbatches=microbatches,
                          **changes)
    return jax.jit(run)(recipe.fresh(0), batch())


def test_loss_is_the_weighted_sum_with_the_mean_over_layers():
    model, params = model_and_params()
    given = batch()
    aux = make_apply(model)(params, given.tokens, reset=given.reset, positions=given.positions,
                            weights=given.present).aux
    _, metrics = step(dict(next_token=1.0, load_balance=0.5, router_z=0.25))
    assert aux["moe/load_balance"].shape == (2,)
    np.testing.assert_allclose(metrics["train/load_balance"], aux["moe/load_balance"].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["train/router_z"], aux["moe/router_z"].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["train/loss"], metrics["train/next_token"]
                               + 0.5 * metrics["train/load_balance"] + 0.25 * metrics["train/router_z"], rtol=1e-5)


@pytest.mark.slow
def test_router_z_adds_up_over_microbatches():
    (one, metrics), (four, more) = (step(dict(next_token=1.0, router_z=0.25), m) for m in (1, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), (four.params, more),
                 (one.params, metrics))


def test_load_balance_with_microbatches_has_to_be_asked_for():
    with pytest.raises(ValueError, match="load_balance does not add up"):
        step(dict(next_token=1.0, load_balance=1.0), microbatches=2)


def test_what_no_layer_reports_is_refused():
    model = build_model({**MODEL, "pattern": ("mlp",)}, 16)
    objective, given = build_objective(dict(next_token=1.0, router_z=0.1)), batch()
    with pytest.raises(ValueError, match=r"config\.loss\.router_z is reported by no layer"):
        jax.eval_shape(lambda: objective(make_apply(model), init_params(model, jax.random.key(0)), (), given, None))


def test_names_are_checked_like_those_of_other_losses():
    with pytest.raises(ValueError, match="did you mean 'load_balance'"):
        resolve_loss(dict(load_balence=1.0))
    with pytest.raises(ValueError, match="router_z has no option"):
        resolve_loss(dict(router_z=dict(weight=1.0, name="x")))
    assert resolve_loss(dict(next_token=1.0, router_z=dict(weight=2)))["router_z"] == {"weight": 2.0}
    with pytest.raises(ValueError, match="router_z only adds to a loss of predictions, and there is none"):
        resolve_loss(dict(router_z=1.0))
