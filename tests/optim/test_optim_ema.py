"""Moving averages of parameters against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.optim.ema import ema_update

DECAY = 0.9


def history(steps=12):
    return [{"w": jnp.asarray(np.random.default_rng(i).normal(size=(3, 2)), jnp.float32)} for i in range(steps)]


@pytest.mark.parametrize("start", [0.0, 1e6])
def test_debiased_average_weighs_the_past_by_powers_of_the_decay(start):
    seen = history()
    ema = jax.tree.map(lambda p: jnp.full_like(p, start), seen[0])
    update = jax.jit(lambda e, p, step: ema_update(e, p, DECAY, step))
    for step, params in enumerate(seen):
        ema = update(ema, params, jnp.int32(step))
        weights = DECAY ** np.arange(step, -1, -1.0)
        want = sum(w * np.asarray(p["w"], np.float64) for w, p in zip(weights, seen, strict=False)) / weights.sum()
        np.testing.assert_allclose(ema["w"], want, rtol=1e-5, atol=1e-6)


def test_debiased_average_forgets_its_start_at_the_first_step():
    params = history(1)[0]
    ema = ema_update({"w": jnp.full((3, 2), 7.0)}, params, DECAY, jnp.int32(0))
    np.testing.assert_allclose(ema["w"], params["w"], rtol=1e-6)


def test_plain_average_is_the_recursion():
    seen = history()
    ema = seen[0]
    want = np.asarray(seen[0]["w"], np.float64)
    for step, params in enumerate(seen[1:]):
        ema = ema_update(ema, params, DECAY, jnp.int32(step), debias=False)
        want = DECAY * want + (1 - DECAY) * np.asarray(params["w"], np.float64)
    np.testing.assert_allclose(ema["w"], want, rtol=1e-5)


def test_long_decays_do_not_lose_the_first_steps_to_rounding():
    ema = {"w": jnp.zeros(1)}
    for step in range(5):
        ema = ema_update(ema, {"w": jnp.full(1, float(step))}, 0.99999, jnp.int32(step))
    assert float(ema["w"][0]) == pytest.approx(2.0, rel=1e-4)
