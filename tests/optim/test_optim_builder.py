"""Updates against formulas written out in numpy, and the parts that do not depend on the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions
from lm.optim.trainable import restore, select


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def small():
    return {"params": {"embed": {"embedding": normal(0, 6, 4)},
                       "mlp": {"kernel": normal(1, 4, 3), "bias": normal(2, 3)}}}


def gradients(step):
    return {"params": {"embed": {"embedding": normal(10 + step, 6, 4)},
                       "mlp": {"kernel": normal(20 + step, 4, 3), "bias": normal(30 + step, 3)}}}


def run(options, steps=6, params=None, grads=gradients, total=100):
    params = jax.tree.map(jnp.asarray, small() if params is None else params)
    optimizer = build_optimizer(options, params, total)
    state = optimizer.tx.init(params)

    @jax.jit
    def one(params, state, g):
        updates, state = optimizer.tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        params, state = one(params, state, grads(step))
    return params, state, optimizer


def flat(tree):
    return {jax.tree_util.keystr(path): np.asarray(x, np.float64)
            for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_close(got, want, rtol=2e-5, atol=1e-6):
    got = flat(got)
    for name, x in flat(want).items():
        np.testing.assert_allclose(got[name], x, rtol=rtol, atol=atol, err_msg=name)


def numpy_loop(direction, *, lr, decay, steps=6, clip=None):
    """Decoupled decay of the kernel only; `direction(memory, gradient, t)` with t from 1, in float64."""
    params, memory = flat(small()), {name: {} for name in flat(small())}
    for step in range(steps):
        grads = flat(gradients(step))
        if clip is not None:
            norm = np.sqrt(sum(np.sum(g * g) for g in grads.values()))
            grads = {name: g * min(1, clip / norm) for name, g in grads.items()}
        for name, g in grads.items():
            u = direction(memory[name], g, step + 1)
            params[name] = params[name] - lr * (u + (decay if "kernel" in name else 0.0) * params[name])
    return params


def assert_equals_numpy(options, direction, **given):
    got = flat(run(options)[0])
    for name, want in numpy_loop(direction, **given).items():
        np.testing.assert_allclose(got[name], want, rtol=2e-5, atol=1e-6, err_msg=name)


def adam_direction(b1, b2, eps):
    def direction(memory, g, t):
        memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * g
        memory["v"] = b2 * memory.get("v", 0.0) + (1 - b2) * g * g
        return memory["m"] / (1 - b1**t) / (np.sqrt(memory["v"] / (1 - b2**t)) + eps)
    return direction


CONSTANT = dict(schedule="constant", warmup_steps=0)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_adamw_is_the_formula(clip):
    options = OptimizerOptions(learning_rate=0.02, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3, clip_norm=clip,
                               **CONSTANT)
    assert_equals_numpy(options, adam_direction(0.8, 0.9, 1e-6), lr=0.02, decay=0.3, clip=clip)


def test_lion_is_the_formula():
    def direction(memory, g, t):
        m = memory.get("m", np.zeros_like(g))
        memory["m"] = 0.99 * m + 0.01 * g
        return np.sign(0.9 * m + 0.1 * g)
    options = OptimizerOptions("lion", learning_rate=0.01, weight_decay=0.3, clip_norm=None, **CONSTANT)
    assert_equals_numpy(options, direction, lr=0.01, decay=0.3)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_the_formula(nesterov):
    def direction(memory, g, t):
        memory["m"] = g + 0.9 * memory.get("m", 0.0)
        return g + 0.9 * memory["m"] if nesterov else memory["m"]
    options = OptimizerOptions("sgd", learning_rate=0.01, weight_decay=0.3, clip_norm=None, nesterov=nesterov,
                               **CONSTANT)
    assert_equals_numpy(options, direction, lr=0.01, decay=0.3)


def test_sgd_without_momentum_holds_no_moments():
    state = run(OptimizerOptions("sgd", momentum=0.0, **CONSTANT), steps=1)[1]
    assert all(leaf.ndim == 0 for leaf in jax.tree.leaves(state))


def test_adafactor_is_optax_adafactor_at_a_constant_rate():
    params = {"params": {"a": {"kernel": normal(0, 12, 9)}, "b": {"bias": normal(1, 9)}}}
    grads = lambda step: {"params": {"a": {"kernel": normal(step + 2, 12, 9)}, "b": {"bias": normal(step + 50, 9)}}}
    options = OptimizerOptions("adafactor", learning_rate=0.05, weight_decay=0.2, momentum=0.7, clip_norm=None,
                               adafactor_min_dim=8, **CONSTANT)
    got, _, _ = run(options, params=params, grads=grads)
    tx = optax.adafactor(0.05, min_dim_size_to_factor=8, momentum=0.7, weight_decay_rate=0.05 * 0.2,
                         weight_decay_mask={"params": {"a": {"kernel": True}, "b": {"bias": False}}})
    want = jax.tree.map(jnp.asarray, params)
    state = tx.init(want)
    for step in range(6):
        updates, state = tx.update(grads(step), state, want)
        want = optax.apply_updates(want, updates)
    assert_close(got, want)


def test_learning_rate_follows_the_schedule_and_the_multiplier():
    options = OptimizerOptions("sgd", learning_rate=1.0, momentum=0.0, weight_decay=0.0, clip_norm=None, warmup_steps=4,
                               schedule="wsd", decay_steps=2, final_fraction=0.5,
                               rules=({"match": "bias", "lr_multiplier": 0.25},))
    ones = lambda step: jax.tree.map(np.ones_like, small())
    got = flat(run(options, steps=8, grads=ones, total=8)[0])
    moved = sum([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75])
    for name, before in flat(small()).items():
        np.testing.assert_allclose(before - got[name], moved * (0.25 if "bias" in name else 1), rtol=1e-5)


def test_each_parameter_decays_by_its_own_rate():
    options = OptimizerOptions("sgd", learning_rate=0.1, momentum=0.0, weight_decay=0.5, **CONSTANT,
                               rules=({"match": "bias", "weight_decay": 0.2},))
    zeros = lambda step: jax.tree.map(np.zeros_like, small())
    got = flat(run(options, steps=3, grads=zeros)[0])
    for name, before in flat(small()).items():
        decay = 0.2 if "bias" in name else 0.5 if "kernel" in name else 0.0
        np.testing.assert_allclose(got[name], before * (1 - 0.1 * decay) ** 3, rtol=1e-5)


def test_frozen_parameters_have_no_state_no_update_and_no_say_in_the_norm():
    options = OptimizerOptions(clip_norm=1.0, rules=({"match": "embed", "freeze": True},), **CONSTANT)
    params, state, optimizer = run(options)
    assert np.array_equal(params["params"]["embed"]["embedding"], small()["params"]["embed"]["embedding"])
    assert not any(leaf.shape == (6, 4) for leaf in jax.tree.leaves(state))
    assert optimizer.trainable_mask["params"] == {"embed": {"embedding": False}, "mlp": {"kernel": True, "bias": True}}

    def huge(step):
        g = gradients(step)
        g["params"]["embed"]["embedding"] = g["params"]["embed"]["embedding"] * 1e6
        return g
    assert_close(run(options, grads=huge)[0], params, rtol=0, atol=0)


def test_gradients_of_the_trainable_part_alone_are_enough():
    options = OptimizerOptions(rules=({"match": "embed", "freeze": True},), **CONSTANT)
    mask = build_optimizer(options, small(), 100).trainable_mask
    loss = lambda trainable: sum(jnp.sum(x**2) for x in jax.tree.leaves(restore(trainable, small(), mask)))
    part = jax.grad(loss)(select(small(), mask))
    assert len(jax.tree.leaves(part)) == 2
    whole = jax.tree.map(lambda x: 2 * x, small())
    assert_close(run(options, grads=lambda step: part)[0], run(options, grads=lambda step: whole)[0])


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_state_is_arrays_only_and_stays_as_it_was_made(name):
    options = OptimizerOptions(name, **CONSTANT)
    _, state, optimizer = run(options, steps=1)
    like = jax.eval_shape(optimizer.tx.init, small())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), like)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


def test_unknown_names_stop_the_builder_too():
    with pytest.raises(ValueError, match="did you mean 'muon'"):
        build_optimizer(OptimizerOptions("muonn"), small(), 10)
