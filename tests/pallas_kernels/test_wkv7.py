"""What is true of wkv7 besides the contract of `tests/contracts/rows_kernels.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_state import assert_chunked_is_exact, gradient_temporaries, with_extreme_decays

from pallas_kernels.wkv6 import wkv6
from pallas_kernels.wkv7 import wkv7
from pallas_kernels.wkv7.solve import solve

implementations = pytest.mark.parametrize("implementation", ["reference", "chunked"])


def transitions(r, w, k, v, a, b, state, reset):
    """y and S_T by products of the transition matrices diag(d) + b a^T; [T, N] of one row and head."""
    size = r.shape[1]
    y, passed = np.zeros(v.shape), [np.eye(size)]       # passed[j]: all transitions after j, before the present
    added = [np.array(state)]
    for t in range(len(r)):
        move = (np.diag(np.exp(w[t])) + np.outer(b[t], a[t])) * (0.0 if reset[t] else 1.0)
        passed = [move @ p for p in passed] + [np.eye(size)]
        added.append(np.outer(k[t], v[t]))
        y[t] = sum(p @ s for p, s in zip(passed, added, strict=True)).T @ r[t]
    return y, sum(p @ s for p, s in zip(passed, added, strict=True))


def drawn(rng, batch, time, heads, keys, values):
    shape = (batch, time, heads)
    kappa = rng.normal(size=(*shape, keys))
    kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    return dict(r=rng.normal(size=(*shape, keys)), w=-np.exp(rng.uniform(-12, 5, (*shape, keys))),
                k=rng.normal(size=(*shape, keys)), v=rng.normal(size=(*shape, values)), a=-kappa,
                b=kappa * rng.random(kappa.shape), state=rng.normal(size=(batch, heads, keys, values)))


@settings(max_examples=3, deadline=None)
@given(st.integers(1, 2), st.integers(1, 40), st.integers(1, 2), st.integers(1, 5), st.integers(1, 5),
       st.floats(0, 1), st.integers(0, 2 ** 31))
def test_any_shape_equals_products_of_transitions(batch, time, heads, keys, values, resets, seed):
    rng = np.random.default_rng(seed)
    x, reset = drawn(rng, batch, time, heads, keys, values), rng.random((batch, time)) < resets
    with jax.enable_x64(True):
        out = {name: jax.jit(functools.partial(wkv7, implementation=name))(**x, reset=reset)
               for name in ("chunked", "reference")}
    for i, h in np.ndindex(batch, heads):
        want = transitions(*(x[n][i, :, h] for n in "rwkvab"), x["state"][i, h], reset[i])
        for y, state in out.values():
            np.testing.assert_allclose(y[i, :, h], want[0], rtol=0, atol=1e-12 * max(1, np.abs(want[0]).max()))
            np.testing.assert_allclose(state[i, h], want[1], rtol=0, atol=1e-12 * max(1, np.abs(want[1]).max()))


@pytest.mark.parametrize("log_decay", [-1e30, 0.0, "mixed"])
def test_extreme_decays(log_decay):
    """One that forgets all, one that forgets nothing, and both in turn: float32 values and gradients stay exact."""
    assert_chunked_is_exact(wkv7, with_extreme_decays(drawn(np.random.default_rng(0), 1, 37, 1, 3, 2), log_decay), 3e-6)


def test_the_same_key_over_and_over():
    """No decay and the rate at 1: each step replaces what the last one wrote. Powers of a would be binomials."""
    x = drawn(np.random.default_rng(0), 1, 70, 1, 4, 3)
    x["w"] = np.zeros_like(x["w"])
    x["a"] = np.broadcast_to([-0.5, 0.5, 0.5, -0.5], x["a"].shape)
    x["b"] = -x["a"]
    assert_chunked_is_exact(wkv7, x, 3e-6)


def test_solve_of_a_long_chunk_of_equal_keys():
    """(I - a)^-1 for a = -1 below the diagonal has 1 and -1 only: exact, whatever the length."""
    length = 64
    a = jnp.asarray(-np.tri(length, k=-1), jnp.float32)
    np.testing.assert_array_equal(solve(a, jnp.eye(length)), np.eye(length) - np.eye(length, k=-1))


@implementations
def test_delta_rule_stores_and_replaces(implementation):
    """With b = -a a unit vector, d = 1 and r = k = that vector, y_t is v_t whatever was stored under the key."""
    rng = np.random.default_rng(0)
    keys = np.linalg.qr(rng.normal(size=(4, 4)))[0][rng.integers(0, 4, (2, 19, 1))]
    v = rng.normal(size=(2, 19, 1, 3))
    state = rng.normal(size=(2, 1, 4, 3))
    with jax.enable_x64(True):
        y, _ = wkv7(keys, np.zeros_like(keys), keys, v, -keys, keys, state, implementation=implementation)
    np.testing.assert_allclose(y, v, atol=1e-12)


@implementations
def test_without_removal_it_is_wkv6_of_the_present(implementation):
    """a = 0 leaves wkv6's state, and wkv7 reads it after the step."""
    x = drawn(np.random.default_rng(0), 2, 20, 2, 3, 4)
    x["a"] = np.zeros_like(x["a"])
    with jax.enable_x64(True):
        y, state = wkv7(**x, implementation=implementation)
        ones = np.ones((2, 3))
        old, want = wkv6(x["r"] * np.exp(x["w"]), x["w"], x["k"], x["v"], 0 * ones, x["state"])
        now = (x["r"] * x["k"]).sum(-1, keepdims=True) * x["v"]
        np.testing.assert_allclose(y, old + now, atol=1e-12)
        np.testing.assert_allclose(state, want, atol=1e-12)


@pytest.mark.slow
def test_memory_is_linear_in_time():
    """Four times the length: the gradient needs at most 4.4 times the temporaries."""
    assert gradient_temporaries(wkv7, drawn, 4096) < 4.4 * gradient_temporaries(wkv7, drawn, 1024)


X, S = jnp.ones((2, 3, 4, 5)), jnp.ones((2, 4, 5, 5))


@pytest.mark.parametrize("change,message", [
    (dict(r=X[0]), r"r has shape \(3, 4, 5\); it must be \[B, T, H, K\]"),
    (dict(w=X[:, :2]), r"w has shape \(2, 2, 4, 5\); it must be \[B, T, H, K\] with T=3"),
    (dict(a=X[..., :2]), r"a has shape \(2, 3, 4, 2\); it must be \[B, T, H, K\] with K=5"),
    (dict(b=X[:1]), r"b has shape \(1, 3, 4, 5\); it must be \[B, T, H, K\] with B=2"),
    (dict(state=S[:, :, :2]), r"state has shape \(2, 4, 2, 5\); it must be \[B, H, K, V\] with K=5"),
    (dict(reset=jnp.zeros((2, 4), bool)), r"reset has shape \(2, 4\); it must be \[B, T\] with T=3"),
    (dict(r=X[:, :0]), r"r has shape \(2, 0, 4, 5\); it must be \[B, T, H, K\] with T at least 1"),
    (dict(b=X.astype(jnp.bfloat16)), r"b\[2, 3, 4, 5\] has dtype bfloat16; it must be that of r, float32"),
    (dict(w=X.astype(int)), r"w\[2, 3, 4, 5\] has dtype int32; it must be a float"),
    (dict(reset=jnp.zeros((2, 3))), r"reset\[2, 3\] has dtype float32; allowed: bool"),
    (dict(implementation="refernce"), r"no implementation 'refernce'; did you mean 'reference'"),
])
def test_bad_input(change, message):
    with pytest.raises(ValueError, match="wkv7.*" + message):
        wkv7(**{**dict(r=X, w=-X, k=X, v=X, a=-X, b=X, state=S), **change})
