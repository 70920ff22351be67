"""minGRU and minLSTM against the paper's equations written as a loop, and identities between the two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.core.types import context
from lm.layers.min_rnn import MinGRU, MinLSTM, positive

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


def test_gates_sum_to_one_at_any_size():
    """f' + i' = 1 and both finite where sigmoid(f) and sigmoid(i) underflow together."""
    for f, i in ((-200.0, -200.0), (300.0, -300.0), (-1e4, 0.0)):
        keep, new = MinLSTM.coefficients(jnp.float32(f), jnp.float32(i))
        assert float(keep + new) == pytest.approx(1.0, abs=1e-6)
    keep, new = MinLSTM.coefficients(jnp.float32(0.7), jnp.float32(0.7))
    assert float(keep) == float(new) == 0.5


def test_min_lstm_is_a_min_gru_with_the_ratio_of_its_gates():
    f, i = jnp.linspace(-4, 4, 9), jnp.linspace(3, -2, 9)
    log_ratio = jax.nn.log_sigmoid(i) - jax.nn.log_sigmoid(f)
    for one, other in zip(MinLSTM.coefficients(f, i), MinGRU.coefficients(log_ratio), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_positive_and_its_gradient():
    x = jnp.array([-60.0, -0.5, -1e-3, 0.0, 2.0])
    np.testing.assert_allclose(positive(x), g(np.asarray(x, np.float64)), rtol=1e-6)
    slope = jax.vmap(jax.grad(positive))(x)
    s = sigmoid(np.asarray(x, np.float64))
    np.testing.assert_allclose(slope, np.where(x >= 0, [0, 0, 0, slope[3], 1], s * (1 - s)), rtol=1e-5, atol=1e-30)
    assert 0 < float(slope[3]) <= 1  # at the kink any value between the two sides


def test_bad_fields():
    with pytest.raises(ValueError, match=r"min_gru\.conv_width=1 must be 0"):
        MinGRU(conv_width=1).check(8)
    with pytest.raises(ValueError, match=r"min_lstm\.hidden_dim=0"):
        MinLSTM(hidden_dim=0).check(8)
