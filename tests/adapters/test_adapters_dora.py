"""DoRA: columns of a length of their own beside a low-rank direction, the length of the direction held constant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.adapters.lora import init_lora, measured, merge, unmerge
from lm.core.low_rank import column_scale
from lm.core.tree import named_leaves
from lm.core.types import Head
from lm.layers.linear import Dense, with_adapter

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


W, A, B, M, X = draw(6, 5), draw(6, 2), draw(2, 5), np.abs(draw(5)) + 0.5, draw(3, 4, 6)


def formula(w, a, b, m):
    """Eq. 5 of the paper, a column an output: m * V / ||V||."""
    v = w.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64)
    return np.stack([m[o] * v[:, o] / np.sqrt((v[:, o] ** 2).sum()) for o in range(v.shape[1])], axis=1)


def dense(lora, x=X):
    return Dense(5).apply({"params": {"kernel": jnp.asarray(W)}, "lora": lora}, jnp.asarray(x))


def test_a_dense_layer_computes_the_formula():
    y = dense({"a": A, "b": B, "magnitude": M})
    np.testing.assert_allclose(y, X @ formula(W, A, B, M), rtol=2e-5, atol=2e-5)


def test_no_gradient_flows_through_the_norm():
    g = draw(3, 4, 5)
    loss = lambda lora: jnp.sum(dense(lora) * g)
    found = jax.grad(loss)({"a": A, "b": B, "magnitude": M})
    # By hand, with C = ||W + a b|| a constant (section 4.3): y = m / C * x (W + a b).
    norm = np.sqrt(((W + A @ B) ** 2).sum(0))
    up = np.einsum("bti,bto->io", X, g * (M / norm))
    np.testing.assert_allclose(found["a"], up @ B.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["b"], A.T @ up, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["magnitude"], ((X @ (W + A @ B)) / norm * g).sum((0, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.oracle
def test_torch_with_a_detached_norm_has_the_same_gradients():
    torch = pytest.importorskip("torch")
    g = draw(3, 4, 5)
    found = jax.grad(lambda lora: jnp.sum(dense(lora) * g))({"a": A, "b": B, "magnitude": M})
    a, b, m = (torch.tensor(v, requires_grad=True) for v in (A, B, M))
    v = torch.tensor(W) + a @ b
    (torch.tensor(X) @ (m * v / v.norm(dim=0).detach()) * torch.tensor(g)).sum().backward()
    for ours, theirs in zip((found["a"], found["b"], found["magnitude"]), (a, b, m), strict=True):
        np.testing.assert_allclose(ours, theirs.grad, rtol=1e-4, atol=1e-4)


def model_params():
    return {"stack": {"pattern_0": {"query": {"kernel": jnp.asarray(draw(3, 6, 5))}}},
            "head": {"kernel": jnp.asarray(draw(9, 6))}}


def test_new_magnitudes_are_the_lengths_of_the_columns_and_change_nothing():
    params = model_params()
    lora = init_lora(jax.random.key(0), params, 2, ".*", magnitude=True)
    assert {name: leaf.shape for name, leaf in named_leaves(lora).items() if name.endswith("magnitude")} == {
        "stack/pattern_0/query/magnitude": (3, 5), "head/magnitude": (9,)}
    np.testing.assert_allclose(lora["stack"]["pattern_0"]["query"]["magnitude"],
                               np.linalg.norm(params["stack"]["pattern_0"]["query"]["kernel"], axis=1), rtol=1e-6)
    np.testing.assert_allclose(lora["head"]["magnitude"], np.linalg.norm(params["head"]["kernel"], axis=1), rtol=1e-6)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(merge(params, lora)), strict=True):
        np.testing.assert_allclose(before, after, rtol=1e-6)
    shapes = init_lora(jax.random.key(0), jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params), 2,
                       ".*", magnitude=True)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, lora)


def test_merging_gives_the_formula_layer_by_layer_and_for_the_head():
    params = model_params()
    lora = init_lora(jax.random.key(0), params, 2, ".*", magnitude=True)
    lora = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.asarray(draw(*leaf.shape)), lora)
    merged, at = merge(params, lora), lora["stack"]["pattern_0"]["query"]
    for layer in range(3):
        np.testing.assert_allclose(
            merged["stack"]["pattern_0"]["query"]["kernel"][layer],
            formula(params["stack"]["pattern_0"]["query"]["kernel"][layer].__array__(),
                    *(np.asarray(at[name][layer]) for name in ("a", "b", "magnitude"))), rtol=1e-4, atol=1e-5)
    head = lora["head"]
    want = formula(np.asarray(params["head"]["kernel"]).T,
                   *(np.asarray(head[name]) for name in ("a", "b", "magnitude"))).T
    np.testing.assert_allclose(merged["head"]["kernel"], want, rtol=1e-4, atol=1e-5)
    hidden = jnp.asarray(draw(2, 3, 6))
    wide, out = with_adapter(hidden, Head(params["head"]["kernel"], None, 9, None), **head)
    np.testing.assert_allclose(wide @ out.kernel.T, hidden @ want.T, rtol=1e-4, atol=1e-4)


def test_magnitudes_are_measured_again_for_other_parameters():
    params, others = model_params(), model_params()
    lora = init_lora(jax.random.key(0), params, 2, ".*", magnitude=True)
    again = measured(others, lora)
    for before, after in zip(jax.tree.leaves(others), jax.tree.leaves(merge(others, again)), strict=True):
        np.testing.assert_allclose(before, after, rtol=1e-6)


def test_a_kernel_of_zeros_gives_zeros_and_no_nan():
    scale = column_scale(jnp.zeros((4, 3)), jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.zeros(3))
    np.testing.assert_array_equal(scale, 0)


def test_magnitudes_cannot_be_taken_out_again():
    params = model_params()
    lora = init_lora(jax.random.key(0), params, 2, ".*", magnitude=True)
    with pytest.raises(ValueError, match="cannot be taken out again"):
        unmerge(merge(params, lora), lora)
