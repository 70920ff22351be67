"""RWKV-5 and RWKV-6 compute what their paper says: against numpy loops written from the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.core.types import context
from lm.layers.rwkv5 import RWKV5
from lm.layers.rwkv6 import RWKV6
from lm.layers.rwkv7 import RWKV7

B, T, D, K = 2, 7, 12, 4


def silu(x):
    return x / (1 + np.exp(-x))


def recurrence(r, k, v, g, decay, bonus, p, eps):
    """Gate, norm and output of the matrix state, one row, head and position at a time. decay [B, T, D] below 1."""
    out = np.zeros((B, T, D))
    for b in range(B):
        for h in range(D // K):
            at = slice(h * K, h * K + K)
            S = np.zeros((K, K))
            for t in range(T):
                now = np.outer(k[b, t, at], v[b, t, at])
                y = r[b, t, at] @ (S + bonus[at, None] * now)
                S = decay[b, t, at, None] * S + now
                y = (y / 8 - (y / 8).mean()) / np.sqrt((y / 8).var() + eps / 64)  # the reference divides first
                out[b, t, at] = y * p["norm"]["scale"][at] + p["norm"]["bias"][at]
    return (out * silu(g)) @ p["out"]["kernel"]


def rwkv5(p, x):
    before = np.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    mixed = lambda n: (x * p[f"mix_{n}"] + before * (1 - p[f"mix_{n}"])) @ p[n]["kernel"]
    decay = np.broadcast_to(np.exp(-np.exp(p["decay"])), x.shape)
    return recurrence(mixed("receptance"), mixed("key"), mixed("value"), mixed("gate"), decay, p["bonus"], p, 64e-5)


def rwkv6(p, x):
    before = np.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    change = before - x
    low = np.tanh((x + change * p["mix_all"]) @ p["mix_in"]["kernel"])
    mixed, rank = {}, low.shape[-1] // 5
    for n, name in enumerate(("decay", "key", "value", "receptance", "gate")):
        delta = low[..., n * rank:(n + 1) * rank] @ p[f"mix_{name}_out"]["kernel"]
        mixed[name] = x + change * (p[f"mix_{name}"] + delta)
    w = p["decay"] + np.tanh(mixed["decay"] @ p["decay_in"]["kernel"]) @ p["decay_out"]["kernel"]
    r, k, v, g = (mixed[n] @ p[n]["kernel"] for n in ("receptance", "key", "value", "gate"))
    return recurrence(r, k, v, g, np.exp(-np.exp(w)), p["bonus"], p, 64e-5)


def drawn(layer):
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    init = jax.jit(lambda: nn.meta.unbox(layer.init(jax.random.key(1), x, layer.initial_state(B, D, x.dtype),
                                                    context(B, T))))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda a: jnp.asarray(a + 0.3 * rng.normal(size=a.shape), jnp.float32), init()), x


@pytest.mark.parametrize("layer, oracle", [(RWKV5(head_dim=K), rwkv5), (RWKV6(head_dim=K, mix_rank=3, decay_rank=5),
                                                                        rwkv6)], ids=["rwkv5", "rwkv6"])
def test_equals_a_loop_over_the_formulas(layer, oracle):
    variables, x = drawn(layer)
    y, _, _ = jax.jit(layer.apply)(variables, x, layer.initial_state(B, D, x.dtype), context(B, T))
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    np.testing.assert_allclose(y, oracle(wide, np.asarray(x, np.float64)), rtol=1e-4, atol=1e-5)


def initial(layer, depth, count):
    """Parameters of the layer at this depth of a model of `count` layers."""
    ctx = context(1, 1)._replace(shared={"depth": jnp.int32(depth), "num_layers": count})
    state = layer.initial_state(1, D, jnp.float32)
    made = jax.jit(lambda: nn.meta.unbox(layer.init(jax.random.key(0), jnp.zeros((1, 1, D)), state, ctx)))()
    return jax.tree.map(np.asarray, made["params"])


def test_initial_values_of_rwkv5():
    """Literal numbers of layer 1 of 3 (r01 = 0.5, r10 = 2/3), channels 0, 3 and 11 of 12."""
    p = initial(RWKV5(head_dim=K), 1, 3)
    at = [0, 3, 11]
    np.testing.assert_allclose(p["decay"][at], [-6, -5.134626, -1], atol=1e-4)
    np.testing.assert_allclose(p["bonus"][at], [0.5, 0.363636, -0.1], atol=1e-5)
    np.testing.assert_allclose(p["mix_key"][at], [0, 0.39685, 0.943650], atol=1e-5)
    np.testing.assert_allclose(p["mix_value"][at], [0.15, 0.54685, 1.093650], atol=1e-5)
    np.testing.assert_allclose(p["mix_receptance"][at], [0, 0.629961, 0.971416], atol=1e-5)
    np.testing.assert_array_equal(p["mix_gate"], p["mix_receptance"])
    np.testing.assert_allclose(p["norm"]["scale"], 0.752897, atol=1e-5)
    assert not p["out"]["kernel"].any()
    for name, gain in dict(receptance=1.0, value=1.0, key=0.1, gate=0.1).items():
        np.testing.assert_allclose(p[name]["kernel"].T @ p[name]["kernel"], gain**2 * np.eye(D), atol=1e-5)


def test_initial_values_of_rwkv6():
    layer = RWKV6(head_dim=K)
    p, five = initial(layer, 1, 3), initial(RWKV5(head_dim=K), 1, 3)
    at = [0, 3, 11]
    for name in ("all", "decay", "key"):
        np.testing.assert_allclose(p[f"mix_{name}"][at], [1, 0.60315, 0.056350], atol=1e-5)
    np.testing.assert_allclose(p["mix_value"][at], [0.85, 0.45315, -0.093650], atol=1e-5)
    for name in ("receptance", "gate"):
        np.testing.assert_allclose(p[f"mix_{name}"][at], [1, 0.370039, 0.028584], atol=1e-5)
    for name in ("decay", "bonus"):
        np.testing.assert_allclose(p[name], five[name], atol=1e-6)
    assert p["mix_in"]["kernel"].shape == (D, 160) and p["decay_in"]["kernel"].shape == (D, 64)
    assert not p["mix_in"]["kernel"].any() and not p["decay_in"]["kernel"].any() and not p["out"]["kernel"].any()
    for name in ("mix_key_out", "decay_out"):
        assert 0.005 < np.abs(p[name]["kernel"]).max() <= 0.01


@pytest.mark.slow
def test_norm_of_rwkv7_grows_with_depth():
    np.testing.assert_allclose(initial(RWKV7(head_dim=K), 0, 3)["norm"]["scale"], 0.463468, atol=1e-5)
    np.testing.assert_allclose(initial(RWKV7(head_dim=K), 2, 3)["norm"]["scale"], 1.0, atol=1e-5)


def test_ranks_of_wide_models():
    assert RWKV6().ranks(2560) == (32, 64) and RWKV6().ranks(4096) == (64, 128)
    assert RWKV6(mix_rank=8, decay_rank=16).ranks(4096) == (8, 16)
    with pytest.raises(ValueError, match=r"rwkv6\.mix_rank=0 must be at least 1"):
        RWKV6(mix_rank=0).check(64)
    with pytest.raises(ValueError, match=r"rwkv5\.head_dim=48 does not divide embed_dim=64"):
        RWKV5(head_dim=48).check(64)
