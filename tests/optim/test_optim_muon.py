"""Muon against optax.contrib.muon, against singular values, and against the mistakes that stacking invites."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from lm.optim.muon import COEFFICIENTS, gram_newton_schulz, newton_schulz, orthogonalize, scale_by_muon


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def trees(step):
    return {"wide": normal(step, 6, 16), "tall": normal(step + 1, 16, 6), "square": normal(step + 2, 8, 8),
            "other": normal(step + 3, 8, 8)}


@pytest.mark.parametrize("consistent_rms", [None, 0.2])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("form", ["standard", "gram"])
def test_equals_optax_muon_on_separate_matrices(nesterov, consistent_rms, form):
    ours = scale_by_muon(0.9, nesterov=nesterov, consistent_rms=consistent_rms, form=form)
    theirs = optax.contrib.muon(-1.0, beta=0.9, nesterov=nesterov, consistent_rms=consistent_rms)
    params = trees(0)
    state, reference = ours.init(params), theirs.init(params)
    update, reference_update = jax.jit(ours.update), jax.jit(theirs.update)
    for step in range(4):
        got, state = update(trees(10 * step), state)
        want, reference = reference_update(trees(10 * step), reference, params)
        for name, x in want.items():
            np.testing.assert_allclose(got[name], x, rtol=2e-5, atol=2e-5, err_msg=f"{name} step {step}")


@pytest.mark.parametrize("iterate", [newton_schulz, gram_newton_schulz])
@pytest.mark.parametrize("shape", [(2, 12, 40), (2, 24, 24)])
def test_singular_values_follow_the_polynomial_and_vectors_stay(iterate, shape):
    x = normal(3, *shape)
    got = np.asarray(iterate(x))
    for before, after in zip(np.asarray(x, np.float64), got, strict=True):
        u, s, vt = np.linalg.svd(before, full_matrices=False)
        s = s / np.linalg.norm(s)
        a, b, c = COEFFICIENTS
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        np.testing.assert_allclose(after, (u * s) @ vt, atol=2e-4)


@pytest.mark.parametrize("iterate", [newton_schulz, gram_newton_schulz])
def test_result_is_near_orthogonal(iterate):
    s = np.linalg.svd(np.asarray(iterate(normal(5, 3, 16, 64))), compute_uv=False)
    assert s.min() > 0.6 and s.max() < 1.25


def test_gram_form_holds_on_ill_conditioned_matrices():
    u, _, vt = np.linalg.svd(np.asarray(normal(7, 32, 96), np.float64), full_matrices=False)
    for spectrum in (np.arange(1, 33.0) ** -2, np.exp(-np.arange(32.0)), np.arange(32) < 4):
        x = jnp.asarray(((u * spectrum) @ vt)[None], jnp.float32)
        np.testing.assert_allclose(gram_newton_schulz(x), newton_schulz(x), atol=2e-3)


def test_axes_in_front_of_a_matrix_are_a_batch_and_equal_shapes_do_not_mix():
    tree = {"experts": normal(0, 2, 3, 6, 10), "turned": normal(1, 4, 10, 6), "one": normal(2, 6, 10)}
    got = orthogonalize(tree)
    alone = lambda x: newton_schulz(x[None])[0] if x.shape[0] <= x.shape[1] else newton_schulz(x.T[None])[0].T
    np.testing.assert_allclose(got["one"], alone(tree["one"]), atol=1e-5)
    np.testing.assert_allclose(got["experts"][1, 2], alone(tree["experts"][1, 2]), atol=1e-5)
    np.testing.assert_allclose(got["turned"][3], alone(tree["turned"][3]), atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_consistent_rms_does_not_depend_on_the_shape(shape):
    tx = scale_by_muon(consistent_rms=0.2)
    update = tx.update(normal(1, *shape), tx.init(normal(0, *shape)))[0]
    assert 0.15 < float(jnp.sqrt(jnp.mean(update**2))) < 0.25


def test_a_zero_gradient_gives_a_zero_update():
    tx = scale_by_muon()
    zeros = jnp.zeros((2, 4, 6))
    update, _ = tx.update(zeros, tx.init(zeros))
    assert not jnp.any(update)


def test_same_on_a_mesh():
    from jax.sharding import NamedSharding, PartitionSpec

    from lm.core.sharding import make_mesh

    tree = {"query": normal(0, 2, 16, 16), "out": normal(1, 2, 16, 16), "up": normal(2, 2, 16, 32)}
    want = orthogonalize(tree)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    with jax.set_mesh(mesh):
        placed = jax.tree.map(jax.device_put, tree, {
            "query": NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor")),
            "out": NamedSharding(mesh, PartitionSpec(None, "tensor", "fsdp")),
            "up": NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))})
        got = jax.jit(orthogonalize)(placed)
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, atol=2e-5, err_msg=name)
