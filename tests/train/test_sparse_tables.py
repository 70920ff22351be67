"""Tables through whole train steps: their gradients as rows, in every form of the stack, of the batch and of the mesh.

The oracle takes the dense gradient of the same step, chooses the rows by hand, and updates these in a loop.
"""

import functools
import itertools

import jax
import numpy as np
import pytest

from lm.core.batch import Batch
from lm.core.sharding import make_mesh
from lm.core.tree import named_leaves
from lm.models.build import abstract_params, build_model, init_params, make_apply
from lm.models.tables import tables_of
from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions
from lm.tasks.build import build_objective
from lm.train.checkpoint import Checkpoints
from lm.train.options import CheckpointOptions
from lm.train.state import Recipe
from lm.train.step import make_train_step

B, T, V = 4, 4, 16
FEW = dict(num_heads=1, top_k=2, key_dim=4, query_norm="layer")  # 2 of N rows a token: 32 choices a step
MODEL = dict(embed_dim=8, num_layers=5, prefix=("peer",), pattern=("pkm", "peer"), dtype="float32", vocab_multiple=1,
             peer=dict(num_experts=256, **FEW), pkm=dict(num_values=144, **FEW))
TABLES = {"stack/prefix_0/peer/experts": 1, "stack/pattern_0/pkm/values": 2, "stack/pattern_1/peer/experts": 2}
OPTIONS = dict(name="adamw", learning_rate=0.05, schedule="constant", warmup_steps=0, eps=1e-3, clip_norm=0.3)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    present = np.arange(T) < rng.integers(2, T + 1, (B, 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], present.astype(np.float32), present.astype(np.int32),
                 np.where(present, np.arange(T), 0).astype(np.int32))


@functools.cache
def recipe(optimizer="adamw", rules=(), small=(), **changes):
    model = build_model({**MODEL, **changes, **{kind: {**MODEL[kind], "num_experts" if kind == "peer" else "num_values":
                                                       rows} for kind, rows in small}}, V)
    options = OptimizerOptions(**OPTIONS, sparse_tables=optimizer, rules=tuple(map(dict, rules)))
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    made = build_optimizer(options, shapes, 100, tables_of(model))
    return model, Recipe(lambda key: init_params(model, key), abstract_params(model), made)


def stepper(microbatches=1, loss=None, **changes):
    model, made = recipe(**changes)
    return made, make_train_step(make_apply(model), build_objective(loss or {}), made.optimizer,
                                 microbatches=microbatches)


@functools.cache
def steps(count=3, **changes):
    """The states after each step, the first one in front, and the last metrics."""
    made, step = stepper(**changes)
    step = jax.jit(step)
    states = [jax.jit(made.fresh)(0)]
    for n in range(count):
        state, metrics = step(states[-1], batch(n))
        states.append(state)
    return states, metrics


def assert_same(got, want, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
                 jax.device_get((got.params, got.opt_state)), jax.device_get((want.params, want.opt_state)))


def rows(leaf, layers):
    return np.asarray(leaf, np.float64).reshape(-1, *leaf.shape[1 + (layers > 1):])


def test_steps_are_those_of_dense_gradients_applied_to_chosen_rows():
    """Also that the gradient is clipped by the norm of all of it, and that choices without weight count as none."""
    model, _ = recipe()
    states, metrics = steps()
    objective = build_objective({})
    memory = {}

    @jax.jit
    def dense(params, batch):
        def loss(params):
            means, *_ = objective(make_apply(model), params, (), batch, jax.random.key(0))
            return sum(mean.value for mean in means.values())
        return jax.grad(loss)(params)

    moved = 0
    for n, (before, after) in enumerate(itertools.pairwise(states)):
        grads = named_leaves({"params": dense(before.params, batch(n))["params"]})
        norm = np.sqrt(sum(np.sum(np.square(np.asarray(g, np.float64))) for g in grads.values()))
        for name, layers in TABLES.items():
            g = rows(grads[name], layers) * min(1, 0.3 / norm)
            old, new = (rows(named_leaves(state.params)[name], layers) for state in (before, after))
            for i in range(len(g)):
                if not g[i].any():
                    np.testing.assert_array_equal(new[i], old[i])
                    continue
                t, m, v = memory.get((name, i), (0, 0.0, 0.0))
                t, m, v = t + 1, 0.9 * m + 0.1 * g[i], 0.95 * v + 0.05 * g[i]**2
                memory[name, i] = t, m, v
                want = old[i] - 0.05 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
                np.testing.assert_allclose(new[i], want, rtol=1e-4, atol=1e-5)
                moved += 1
    assert 30 < moved < 3 * 5 * 32
    np.testing.assert_allclose(metrics["train/grad_norm"], norm, rtol=1e-5)
    counts = states[-1].opt_state.tables.count["params"]["stack"]["pattern_1"]["peer"]["experts"]
    assert counts.shape == (2, 256) and int(counts.sum()) == sum(
        t for (name, _), (t, _, _) in memory.items() if name == "stack/pattern_1/peer/experts")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    dict(scan=False), dict(remat="full"), dict(microbatches=2), dict(microbatches=4, scan=False, remat="full"),
], ids=["unrolled", "remat", "microbatches", "all"])
def test_the_same_in_every_form(changes):
    assert_same(steps(**changes)[0][-1], steps()[0][-1])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adagrad", "sgd"])
def test_few_rows_are_summed_densely_to_the_same(optimizer, monkeypatch):
    rule = (("match", "experts$"), ("weight_decay", 0.3), ("lr_multiplier", 2.0), ("freeze_first", (20, -3)))
    states, _ = steps(optimizer=optimizer, rules=(rule,))
    monkeypatch.setattr("lm.core.tables.DENSE_SHARE", 1e9)
    made, step = stepper(optimizer=optimizer, rules=(rule,))
    state = jax.jit(made.fresh)(0)
    for n in range(3):
        state, _ = jax.jit(step)(state, batch(n))
    assert_same(state, states[-1])
    before, after = (named_leaves(s.params)["stack/prefix_0/peer/experts"] for s in (states[0], state))
    np.testing.assert_array_equal(before[:20], after[:20])
    assert (before[20:] != after[20:]).any()


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True], ids=["rows", "dense"])
@pytest.mark.parametrize("sizes", [dict(data=8), dict(data=2, expert=4), dict(fsdp=2, expert=2, tensor=2),
                                   dict(data=2, context=2, tensor=2)], ids=str)
def test_over_devices_as_on_one(sizes, dense, monkeypatch):
    """Where an axis does not divide the heads (1 here), its devices do the same work, which counts once."""
    want = steps()[0][-1]
    monkeypatch.setattr("lm.core.tables.DENSE_SHARE", 1e9 if dense else 0)
    mesh = make_mesh(sizes)
    made, step = stepper()
    data = [jax.tree.map(lambda a: np.tile(a, (2, 1)), batch(n)) for n in range(3)] if sizes == dict(data=8) else \
        [batch(n) for n in range(3)]
    with jax.set_mesh(mesh):
        state = made.create(0, mesh)
        run = jax.jit(step, out_shardings=(made.shardings(mesh), None))
        for one in data:
            state, _ = jax.block_until_ready(run(state, one))
    assert_same(state, want)


@pytest.mark.slow
def test_a_checkpoint_holds_the_state_of_rows(tmp_path):
    states, _ = steps()
    with_options = Checkpoints(tmp_path, CheckpointOptions())
    with_options.save(2, states[2], {})
    made, step = stepper()
    state, _ = with_options.restore(made.abstract(make_mesh({"data": 1}, devices=jax.devices()[:1])))
    with_options.close()
    assert_same(jax.jit(step)(state, batch(2))[0], states[3], tolerance=0)


def test_a_step_that_is_not_finite_changes_no_row():
    made, step = stepper(loss={"next_token": float("inf")})
    state = jax.jit(made.fresh)(0)
    after, _ = jax.jit(step)(state, batch())
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))


def test_an_objective_that_runs_the_model_twice_is_refused():
    model, made = recipe()
    objective = build_objective({})

    class Twice:
        weights, not_additive, carry_per_row, counts = (objective.weights, objective.not_additive,
                                                        objective.carry_per_row, objective.counts)

        def __call__(self, apply, params, carry, batch, key):
            objective(apply, params, carry, batch, key)
            return objective(apply, params, carry, batch, key)

    step = make_train_step(make_apply(model), Twice(), made.optimizer)
    with pytest.raises(ValueError, match="one pass of the model a step, and this objective makes several"):
        jax.eval_shape(step, jax.eval_shape(lambda: made.fresh(0)), batch())


def test_no_table_is_copied():
    """Tables and moments change in place, also those of a scan over layers: temporaries are small beside one table."""
    layers = dict(embed_dim=32, num_layers=3, pattern=("peer",), small=(("peer", 128**2),))
    made, step = stepper(**layers)
    state = jax.eval_shape(lambda: made.fresh(0))
    memory = jax.jit(step, donate_argnums=0).lower(state, batch()).compile().memory_analysis()
    table = 128**2 * 2 * 32 * 4
    assert memory.temp_size_in_bytes < table / 4 and memory.alias_size_in_bytes > 9 * table
