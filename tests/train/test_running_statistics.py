"""Running statistics through the train step, the stack's forms, microbatches, checkpoints and evaluation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.adapters import FROZEN
from lm.adapters.lora import init_lora
from lm.core.batch import Batch
from lm.core.sharding import make_mesh
from lm.core.tally import Moments, Usage, by_layer, settle, unevenness
from lm.core.types import Mean
from lm.models.build import abstract_params, build_model, init_params, make_apply, not_additive
from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions
from lm.tasks.build import build_objective
from lm.train.checkpoint import Checkpoints, restore_params
from lm.train.options import CheckpointOptions
from lm.train.state import Recipe
from lm.train.step import make_train_step

B, T = 8, 8
PEER = dict(num_experts=16, num_heads=2, top_k=2, key_dim=4, dead_after=2)
MODEL = dict(embed_dim=8, num_layers=5, prefix=("peer",), pattern=("mlp", "peer"), mlp=dict(mlp_dim=8),
             peer=PEER, dtype="float32", vocab_multiple=1)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 16, (B, T + 1)).astype(np.int32)
    present = np.arange(T) < rng.integers(3, T + 1, (B, 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], present.astype(np.float32), present.astype(np.int32),
                 np.where(present, np.arange(T), 0).astype(np.int32))


@functools.cache
def recipe(query_norm="batch", **changes):
    model = build_model({**MODEL, "peer": {**PEER, "query_norm": query_norm}, **changes}, 16)
    boxed = abstract_params(model)
    options = OptimizerOptions("sgd", learning_rate=0.1, schedule="constant", warmup_steps=0, ema_decay=0.5)
    optimizer = build_optimizer(options, jax.eval_shape(lambda: init_params(model, jax.random.key(0))), 10)
    return model, Recipe(lambda key: init_params(model, key), boxed, optimizer)


def steps(count, microbatches=1, **changes):
    model, made = recipe(**changes)
    step = jax.jit(make_train_step(make_apply(model), build_objective({}), made.optimizer, microbatches=microbatches,
                                   per_microbatch=microbatches > 1))
    state = jax.jit(made.fresh)(0)
    for n in range(count):
        state, metrics = step(state, batch(n))
    return state, metrics


@functools.cache
def two_steps():
    return steps(2)


def test_statistics_move_and_parameters_do_not_mix_with_them():
    state, metrics = two_steps()
    stats = state.params["stats"]["stack"]
    assert set(stats) == {"prefix_0", "pattern_1"} and stats["pattern_1"]["peer"]["usage"]["idle"].shape == (2, 16)
    queries = stats["pattern_1"]["peer"]["router"]["queries"]
    np.testing.assert_array_equal(queries["steps"], [2, 2])
    assert float(jnp.abs(queries["mean"]).max()) > 0 and float(jnp.abs(queries["var"] - 1).max()) > 0
    jax.tree.map(np.testing.assert_array_equal, state.ema["stats"], state.params["stats"])
    assert not any("stats" in jax.tree_util.keystr(path)
                   for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state))
    assert {f"train/layer_{n}/peer/{name}" for n in (0, 2, 4)
            for name in ("usage", "unevenness", "dead", "entropy", "overlap")} <= set(metrics)
    assert not any(name.startswith(("train/layer_1/", "train/layer_3/")) for name in metrics)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(scan=False), dict(remat="full")], ids=["unrolled", "remat"])
def test_the_same_in_every_form_of_the_stack(changes):
    state, metrics = steps(2, **changes)
    want, want_metrics = two_steps()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), (state.params, metrics),
                 (want.params, want_metrics))


@pytest.mark.slow
def test_microbatches_are_counted_together():
    """Without a batch norm all metrics are those of the whole batch, also the ones that are no means."""
    (state, metrics), (want, want_metrics) = (steps(2, microbatches=m, query_norm="layer") for m in (4, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), (state.params, metrics),
                 (want.params, want_metrics))
    # With one the first layer's queries do not depend on how it normalises: its moments are those of the batch too.
    (state, _), (want, _) = steps(1, microbatches=4), steps(1)
    pick = lambda s: s.params["stats"]["stack"]["prefix_0"]["peer"]["router"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), pick(state), pick(want))


def test_a_batch_norm_with_microbatches_has_to_be_asked_for():
    model, made = recipe()
    objective = build_objective({}, not_additive=not_additive(model))
    with pytest.raises(ValueError, match=r"peer\.query_norm='batch' does not add up over microbatches"):
        make_train_step(make_apply(model), objective, made.optimizer, microbatches=2)


@pytest.mark.slow
def test_a_checkpoint_holds_them_and_evaluation_uses_them(tmp_path):
    state, _ = two_steps()
    with_options = Checkpoints(tmp_path, CheckpointOptions())
    with_options.save(2, state, {})
    with_options.close()
    params, _ = restore_params(tmp_path, None)
    jax.tree.map(np.testing.assert_array_equal, params["stats"], jax.device_get(state.params["stats"]))
    model, _ = recipe()
    apply = jax.jit(make_apply(model))
    tokens = batch(5).tokens
    before = apply(params, tokens).hidden
    one_row = apply(params, tokens[:1]).hidden
    np.testing.assert_allclose(one_row, before[:1], rtol=1e-5, atol=1e-5)  # of this row alone, not of the batch
    moved = jax.tree.map(lambda a: a + 1, params["stats"])
    assert float(jnp.abs(apply({**params, "stats": moved}, tokens).hidden - before).max()) > 1e-3


@pytest.mark.slow
def test_a_step_that_is_not_finite_moves_no_statistics():
    model, made = recipe()
    step = jax.jit(make_train_step(make_apply(model), build_objective({"next_token": float("inf")}), made.optimizer))
    state = jax.jit(made.fresh)(0)
    after, _ = step(state, batch())
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


@pytest.mark.slow
def test_split_over_a_mesh_statistics_are_those_of_one_device():
    model, made = recipe()
    mesh = make_mesh({"data": 2, "expert": 4})
    step = make_train_step(make_apply(model), build_objective({}), made.optimizer)
    with jax.set_mesh(mesh):
        state = made.create(0, mesh)
        for n in range(2):
            state, metrics = jax.jit(step, out_shardings=(made.shardings(mesh), None))(state, batch(n))
    want, want_metrics = two_steps()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
                 jax.device_get((state.params, metrics)), jax.device_get((want.params, want_metrics)))


def test_moving_averages_start_as_plain_ones():
    stats = {"mean": jnp.zeros(1), "var": jnp.ones(1), "steps": jnp.zeros(())}
    values = [1.0, 5.0, 3.0]
    for value in values:
        x = jnp.array([[value - 1], [value + 1]])
        stats, _ = Moments.of(x, jnp.ones(2), 0.9).settle(stats)
    np.testing.assert_allclose(stats["mean"], [3.0], rtol=1e-6)
    np.testing.assert_allclose(stats["var"], [1.0], rtol=1e-5)
    same, _ = Moments.of(x, jnp.zeros(2), 0.9).settle(stats)
    jax.tree.map(np.testing.assert_array_equal, same, stats)


def test_unevenness_is_the_divergence_from_uniform():
    N, m = 64, 8
    some = jnp.zeros(N).at[jnp.arange(m) * 3].set(0.5)
    cases = jnp.stack([some, jnp.full(N, 2.0), jnp.zeros(N).at[5].set(3.0), jnp.zeros(N)])
    np.testing.assert_allclose(unevenness(cases), [np.log(N / m), 0, np.log(N), 0], atol=1e-5)


def test_dead_experts_are_those_idle_for_the_window():
    stats = {"idle": jnp.zeros(4)}
    for scores in ([1, 0, 0, 1], [1, 0, 1, 0], [1, 0, 0, 0]):
        stats, metrics = Usage(jnp.array(scores, jnp.float32), window=2).settle(stats)
    np.testing.assert_array_equal(stats["idle"], [0, 3, 1, 2])
    assert (float(metrics["dead"]), float(metrics["usage"])) == (0.5, 0.25)


def test_metrics_are_named_by_depth():
    tally = {"stack": {"prefix_0": {"a": {"entropy": Mean(jnp.float32(2), jnp.float32(4))}},
                       "pattern_1": {"a": {"entropy": Mean(jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0]))}}}}
    _, metrics = settle({}, tally)
    names = {f"stack/{block}/norm0/scale": jnp.zeros((2, 3)) for block in ("prefix_0", "pattern_0", "pattern_1")}
    named = {name: float(value) for name, value in by_layer(metrics, names).items()}
    assert named == {"layer_0/a/entropy": 0.5, "layer_2/a/entropy": 1.0, "layer_4/a/entropy": 2.0}


def test_adapters_leave_the_statistics_of_the_model_alone():
    """As they leave its parameters: the same base serves other adapters, and itself."""
    model, made = recipe()
    params = init_params(model, jax.random.key(0))
    params = {**params, "lora": init_lora(jax.random.key(1), params["params"], 2, "mlp/.*kernel")}
    optimizer = build_optimizer(dataclasses.replace(made.optimizer.options, rules=(FROZEN,)), params, 10)
    state = Recipe(lambda key: params, None, optimizer).fresh(0)
    after, metrics = jax.jit(make_train_step(make_apply(model), build_objective({}), optimizer))(state, batch())
    for kept in ("params", "stats"):
        jax.tree.map(np.testing.assert_array_equal, after.params[kept], state.params[kept])
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), after.params["lora"],
                                            state.params["lora"])))
    assert "train/layer_0/peer/usage" in metrics
