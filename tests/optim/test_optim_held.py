"""What is held keeps every bit, under every optimizer, with moments and decay that would move it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions
from lm.optim.rules import format_table, table

HELD = {"match": "experts$", "freeze_first": (5, -2)}
DECAY = {"match": "", "weight_decay": 0.1}
PARAMS = {"params": {"stack": {"pattern_0": {"experts": jax.random.normal(jax.random.key(0), (2, 9, 4))}},
                     "head": {"kernel": jax.random.normal(jax.random.key(1), (9, 4)).at[0].set(-0.0)}}}


def bits(a):
    return np.asarray(a).view(np.uint32)


def trained(options, params, state, steps, start=0):
    tx = build_optimizer(OptimizerOptions(learning_rate=0.01, **options), PARAMS, 200).tx
    state = tx.init(params) if state is None else state

    def step(n, carry):
        params, state = carry
        grads = jax.tree.map(lambda a: jax.random.normal(jax.random.fold_in(jax.random.key(2), n), a.shape), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state
    return jax.jit(lambda carry: jax.lax.fori_loop(start, start + steps, step, carry))((params, state))


@pytest.mark.parametrize("name", ["adamw", pytest.param("sgd", marks=pytest.mark.slow),
                                  pytest.param("lion", marks=pytest.mark.slow),
                                  pytest.param("adafactor", marks=pytest.mark.slow)])
def test_held_rows_keep_every_bit_for_100_steps_whatever_momentum_they_had(name):
    """The moments come from steps in which nothing was held."""
    params, state = trained(dict(name=name, rules=(DECAY,)), PARAMS, None, 5)
    head = {"match": "head", "freeze_first": (1, -2)}
    params["params"]["head"]["kernel"] = params["params"]["head"]["kernel"].at[0].set(jnp.array([0.0, -0.0, 1.0, 2.0]))
    after, _ = trained(dict(name=name, rules=(HELD, head, DECAY)), params, state, 100, 5)
    before, after = (tree["params"] for tree in (params, after))
    experts, now = (tree["stack"]["pattern_0"]["experts"] for tree in (before, after))
    assert (bits(experts[:, :5]) == bits(now[:, :5])).all() and (bits(experts[:, 5:]) != bits(now[:, 5:])).all()
    kernel, now = before["head"]["kernel"], after["head"]["kernel"]
    assert (bits(kernel[0]) == bits(now[0])).all() and (bits(kernel[1:]) != bits(now[1:])).all()


def test_held_rows_do_not_enter_the_norm_that_clips():
    tx = build_optimizer(OptimizerOptions(name="sgd", momentum=0.0, learning_rate=1.0, schedule="constant",
                                          warmup_steps=0, clip_norm=1.0, rules=(HELD,)), PARAMS, 10).tx
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    grads["params"]["stack"]["pattern_0"]["experts"] = jnp.zeros((2, 9, 4)).at[:, :5].set(1e6).at[0, 5, 0].set(0.5)
    updates = tx.update(grads, tx.init(PARAMS), PARAMS)[0]["params"]["stack"]["pattern_0"]["experts"]
    assert float(updates[0, 5, 0]) == -0.5 and float(jnp.abs(updates).sum()) == 0.5


def test_a_rule_that_holds_is_in_the_table_and_more_than_there_is_is_refused():
    rows = table(OptimizerOptions(rules=(HELD,)), PARAMS)
    assert {row.name: row.trainable for row in rows} == {"stack/pattern_0/experts": 32, "head/kernel": 36}
    assert "first 5 frozen" in format_table(rows) and "68 trainable" in format_table(rows)
    for rule, message in (((10, -2), "it has 9 of them"), ((1, -4), "axes -1 to -2"), ((-1, -1), "count of at least 0"),
                          ((1, 0), "counted from the last")):
        options = OptimizerOptions(rules=({"match": "experts", "freeze_first": rule},))
        with pytest.raises(ValueError, match=message):
            options.check()
            table(options, PARAMS)
