"""Vmapped adapter steps equal a loop over the sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.adapters.lora import init_lora
from lm.adapters.per_example import init_per_example, per_example_step, stack_lora

PARAMS = {"mlp": {"kernel": jax.random.normal(jax.random.key(0), (6, 4))}}


def loss_fn(params, lora, example):
    x, y = example
    adapter = lora["mlp"]
    return jnp.mean((x @ params["mlp"]["kernel"] + x @ adapter["a"] @ adapter["b"] - y) ** 2)


def examples(n):
    return jax.random.normal(jax.random.key(1), (n, 5, 6)), jax.random.normal(jax.random.key(2), (n, 5, 4))


@pytest.mark.parametrize("tx", [optax.sgd(0.1, momentum=0.9), optax.adamw(0.01, eps=1e-6),
                                optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))])
def test_equals_a_loop(tx):
    n, steps = 3, 4
    lora = init_lora(jax.random.key(3), PARAMS, 2, "mlp")
    loras, data = stack_lora(lora, n), examples(n)
    states, step, losses = init_per_example(tx, loras), jax.jit(per_example_step(loss_fn, tx)), []
    for _ in range(steps):
        loras, states, loss = step(PARAMS, loras, states, data)
        losses.append(loss)
    for i in range(n):
        alone, state = lora, tx.init(lora)
        example = jax.tree.map(lambda x, i=i: x[i], data)
        for s in range(steps):
            loss, grads = jax.value_and_grad(loss_fn, argnums=1)(PARAMS, alone, example)
            updates, state = tx.update(grads, state, alone)
            alone = optax.apply_updates(alone, updates)
            np.testing.assert_allclose(losses[s][i], loss, rtol=1e-5)
        for got, want in zip(jax.tree.leaves(loras), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(loras["mlp"]["b"][0] - loras["mlp"]["b"][1])) > 1e-3, "each sequence has its own adapter"
    assert all(later < first for later, first in zip(losses[-1], losses[0], strict=True))


def test_copies_start_equal():
    lora = init_lora(jax.random.key(3), PARAMS, 2, "mlp")
    copies = stack_lora(lora, 4)["mlp"]["a"]
    assert copies.shape == (4, 6, 2)
    np.testing.assert_array_equal(copies, np.broadcast_to(lora["mlp"]["a"], (4, 6, 2)))
    with pytest.raises(ValueError, match="at least 1"):
        stack_lora(lora, 0)
