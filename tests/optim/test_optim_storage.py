"""Moments in bfloat16: rounding without bias, and what it is needed for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions
from lm.optim.storage import random_bits, round_stochastically, store_in_bfloat16


@pytest.mark.parametrize("value", [1.001, -3.1415927, 1e-6, -2.3e20, 0.1])
def test_rounding_is_unbiased_and_to_a_neighbour(value):
    x = jnp.full(40_000, value, jnp.float32)
    got = np.asarray(round_stochastically(x, jax.random.key(0)), np.float64)
    gap = abs(float(np.float64(np.unique(got)[-1] - np.unique(got)[0])))
    assert len(np.unique(got)) == 2 and got.min() < np.float32(value) < got.max()
    assert gap <= abs(value) / 128
    # The mean of n draws of a two-point distribution is within 5 standard errors of its expectation.
    assert abs(got.mean() - np.float64(np.float32(value))) < 5 * gap / 2 / np.sqrt(len(got))


def test_random_bits_are_uniform_and_independent_of_their_neighbours_and_of_the_step():
    first, later = (np.asarray(random_bits((64, 1024), jax.random.key(seed))) for seed in (0, 1))
    counts = np.bincount(first.ravel() >> 8, minlength=256)
    assert first.max() < 2**16 and np.sum((counts - 256) ** 2 / 256) < 256 + 5 * np.sqrt(2 * 256)
    for a, b in ((first[:, 1:], first[:, :-1]), (first[1:], first[:-1]), (first, later)):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)


def test_what_bfloat16_holds_is_kept_and_so_are_infinities():
    x = jnp.asarray([0.0, 1.0, -1.5, jnp.inf, -jnp.inf], jnp.float32)
    np.testing.assert_array_equal(np.asarray(round_stochastically(x, jax.random.key(1)), np.float32), x)
    assert jnp.isnan(round_stochastically(jnp.asarray([jnp.nan]), jax.random.key(1)))[0]


def second_moment(stochastic, steps=4000):
    """Average of Adam's second moment with b2 = 0.999 after its gradient has gone from 1 to 0.5."""
    tx = store_in_bfloat16(optax.scale_by_adam(0.9, 0.999), stochastic=stochastic)
    params = {"w": jnp.zeros(256)}
    state = tx.init(params)
    state = state._replace(inner=state.inner._replace(nu={"w": jnp.ones(256, jnp.bfloat16)}))

    def one(state, _):
        return tx.update({"w": jnp.full(256, 0.5)}, state, params)[1], None
    return float(jnp.mean(jax.lax.scan(one, state, None, steps)[0].inner.nu["w"].astype(jnp.float32)))


def test_rounding_to_nearest_stalls_where_stochastic_rounding_moves():
    exact = 0.25 + 0.75 * 0.999**4000
    assert second_moment(stochastic=False) == 1.0  # 0.999 + 0.001 * 0.25 rounds back to 1 for ever
    assert second_moment(stochastic=True) == pytest.approx(exact, rel=0.02)


def params_of(seed):
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.normal(size=(2, 8, 12)), jnp.float32)
    return {"params": {"stack": {"pattern_0": {"mlp": {"kernel": kernel}}}, "norm": {"scale": jnp.ones(8)}}}


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_every_optimizer_stores_its_moments_in_bfloat16(name):
    options = OptimizerOptions(name, state_dtype="bfloat16", stochastic_rounding=True, warmup_steps=0,
                               adafactor_min_dim=8, momentum=0.9 if name == "adafactor" else None)
    params = params_of(0)
    tx = build_optimizer(options, params, 10).tx
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(3):
        updates, state = update(params_of(step), state, params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape in shapes]
    assert moments and all(leaf.dtype == jnp.bfloat16 for leaf in moments)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(updates))
    if name == "adafactor":
        factored = [leaf for leaf in jax.tree.leaves(state) if leaf.shape in ((2, 8), (2, 12))]
        assert len(factored) == 2 and all(leaf.dtype == jnp.float32 for leaf in factored)


def test_random_bits_depend_on_count_and_name_only():
    tx = store_in_bfloat16(optax.trace(0.9), stochastic=True)
    params = {"a": jnp.zeros(500), "b": jnp.zeros(500)}
    grads = jax.tree.map(lambda p: p + 1.001, params)
    first = tx.update(grads, tx.init(params), params)[1]
    again = tx.update(grads, tx.init(params), params)[1]
    later = tx.update(grads, tx.init(params)._replace(count=jnp.int32(7)), params)[1]
    trace = lambda state, name: np.asarray(state.inner.trace[name], np.float32)
    np.testing.assert_array_equal(trace(first, "a"), trace(again, "a"))
    assert np.any(trace(first, "a") != trace(first, "b"))
    assert np.any(trace(first, "a") != trace(later, "a"))
