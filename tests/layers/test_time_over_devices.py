"""Recurrent layers with time split over the mesh axis `context` compute what they compute on one device."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.core.sharding import make_mesh
from lm.core.types import context
from lm.layers.min_rnn import MinGRU, MinLSTM
from lm.layers.rwkv4 import RWKV4
from lm.layers.rwkv5 import RWKV5
from lm.layers.rwkv6 import RWKV6
from lm.layers.rwkv7 import RWKV7
from lm.layers.token_shift import lags

B, T, D = 2, 24, 16

@pytest.mark.parametrize("lags_wanted", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("present", [1.0, pytest.param(0.4, marks=pytest.mark.slow)])
def test_tokens_before(lags_wanted, present):
    """Stretches of one position, shorter than the history, with resets and padding anywhere: also the gradients."""
    keys = jax.random.split(jax.random.key(3), 5)
    time = 8
    x, history = jax.random.normal(keys[0], (B, time, D)), jax.random.normal(keys[1], (B, lags_wanted, D))
    ctx = context(B, time)._replace(reset=jax.random.bernoulli(keys[2], 0.2, (B, time)),
                                    weights=jax.random.bernoulli(keys[3], present, (B, time)).astype(jnp.float32))
    weight = jax.random.normal(keys[4], (B, time, D)) * ctx.weights[..., None]

    @jax.jit
    def run(x, history):
        def loss(x, history):
            before, after = lags(x, history, ctx)
            return sum(jnp.sum(y * weight * i) for i, y in enumerate(before, 1)) + jnp.sum(jnp.sin(after)), (
                [y * ctx.weights[..., None] for y in before], after)
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, history)

    want = run(x, history)
    with jax.set_mesh(make_mesh({"context": 8})):
        got = run(x, history)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


LAYERS = [MinGRU(conv_width=3), MinLSTM(), RWKV4(), RWKV5(head_dim=8),
          RWKV6(head_dim=8, mix_rank=4, decay_rank=4), RWKV7(head_dim=8, value_residual=False)]


@pytest.mark.slow       # by default: a training run over `context` in tests/train/test_equal_losses.py
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_outputs_states_and_gradients_of_layers(layer):
    """Documents start inside of stretches and at their edge, and one row ends in padding."""
    with jax.enable_x64(True):
        (want_y, want_state), want = outputs_and_gradients(layer, {})
        (got_y, got_state), got = outputs_and_gradients(layer, {"data": 2, "context": 4})
    for one, other in ((got_y, want_y), (got_state, want_state), (got, want)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max(initial=1)),
                     one, other)


def outputs_and_gradients(layer, mesh):
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    reset = jnp.zeros((B, T), bool).at[0, 6].set(True).at[0, 15].set(True).at[1, 3].set(True)
    ctx = context(B, T)._replace(reset=reset, weights=jnp.ones((B, T)).at[1, 17:].set(0))
    boxed = layer.init(jax.random.key(1), x, layer.initial_state(B, D, x.dtype), ctx)
    variables = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape),
                             nn.meta.unbox(boxed))
    state = jax.tree.map(lambda s: s + 0.3, layer.initial_state(B, D, x.dtype))
    weight = jax.random.normal(jax.random.key(2), (B, T, D)) * ctx.weights[..., None]

    def loss(variables, x, state):
        y, after, _ = layer.apply(variables, x, state, ctx)
        return (jnp.sum(y * weight) + sum(jnp.sum(jnp.sin(s)) for s in jax.tree.leaves(after)),
                (y * ctx.weights[..., None], after))

    with jax.set_mesh(make_mesh(mesh)) if mesh else contextlib.nullcontext():
        gradients, outputs = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(variables, x, state)
    return outputs, gradients
