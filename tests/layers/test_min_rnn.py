"""minGRU and minLSTM against the paper's equations written as a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.core.types import context
from lm.layers.min_rnn import MinGRU, MinLSTM

B, T, D = 2, 11, 8


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def g(x):
    return np.where(x >= 0, x + 0.5, sigmoid(x))


ACTIVATIONS = {"g": g, "identity": lambda x: x, "tanh": np.tanh}


def setup(layer, seed=0):
    x = jax.random.normal(jax.random.key(seed), (B, T, D))
    boxed = layer.init(jax.random.key(seed + 1), x, layer.initial_state(B, D, x.dtype), context(B, T))
    return nn.meta.unbox(boxed), x


def kernels(variables):
    return {name: np.asarray(p["kernel"], np.float64) for name, p in variables["params"].items()}


@pytest.mark.parametrize("act", list(ACTIVATIONS))
def test_min_gru_is_the_papers_loop(act):
    layer = MinGRU(hidden_act=act)
    variables, x = setup(layer)
    w, x = kernels(variables), np.asarray(x, np.float64)
    h, want = np.zeros((B, 2 * D)), []
    for t in range(T):
        z = sigmoid(x[:, t] @ w["update"])
        h = (1 - z) * h + z * ACTIVATIONS[act](x[:, t] @ w["candidate"])
        want.append(h @ w["out"])
    y, state, _ = layer.apply(variables, jnp.asarray(x, jnp.float32), layer.initial_state(B, D, jnp.float32),
                              context(B, T))
    np.testing.assert_allclose(y, np.stack(want, 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.hidden, h, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("act", list(ACTIVATIONS))
def test_min_lstm_is_the_papers_loop(act):
    layer = MinLSTM(hidden_act=act, hidden_dim=12)
    variables, x = setup(layer)
    w, x = kernels(variables), np.asarray(x, np.float64)
    h, want = np.zeros((B, 12)), []
    for t in range(T):
        f, i = sigmoid(x[:, t] @ w["forget"]), sigmoid(x[:, t] @ w["input"])
        h = f / (f + i) * h + i / (f + i) * ACTIVATIONS[act](x[:, t] @ w["candidate"])
        want.append(h @ w["out"])
    y, _, _ = layer.apply(variables, jnp.asarray(x, jnp.float32), layer.initial_state(B, D, jnp.float32), context(B, T))
    np.testing.assert_allclose(y, np.stack(want, 1), rtol=1e-5, atol=1e-6)


def test_bad_fields():
    with pytest.raises(ValueError, match=r"min_gru\.conv_width=1 must be 0"):
        MinGRU(conv_width=1).check(8)
    with pytest.raises(ValueError, match=r"min_lstm\.hidden_dim=0"):
        MinLSTM(hidden_dim=0).check(8)
