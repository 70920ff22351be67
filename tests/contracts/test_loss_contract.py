"""What every loss must hold. A row in `rows_losses.py` buys all of these.

Shapes: B batch, T time, D embed_dim, V padded vocabulary of which REAL ids exist.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from rows_losses import ROWS

from lm.core.batch import Batch
from lm.core.types import Head, Mean, Output
from lm.losses import LOSSES
from lm.losses.base import Term
from lm.losses.cross_entropy import token_scores
from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions
from lm.tasks.language_modeling import LanguageModeling
from lm.train.state import Recipe
from lm.train.step import make_train_step

B, T, D, V, REAL = 8, 6, 5, 12, 10
losses = pytest.mark.parametrize("loss", [loss for _, loss in ROWS], ids=[name for name, _ in ROWS])


def make(seed=0, dtype=jnp.float32, scale=1.0):
    """(hidden [B, T, D], kernel [V, D], batch) with a third of the targets masked, rows unequally."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(scale * rng.normal(size=(B, T, D)), dtype)
    kernel = jnp.asarray(rng.normal(size=(V, D)), dtype)
    tokens = rng.integers(0, REAL, (B, T)).astype(np.int32)
    targets = rng.integers(0, REAL, (B, T)).astype(np.int32)
    weights = (rng.random((B, T)) < np.linspace(0.2, 1, B)[:, None]).astype(np.float32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return hidden, kernel, Batch(tokens, targets, weights, np.ones((B, T), np.int32), positions)


def per_position(loss, hidden, kernel, batch):
    """[B, T] values of the loss under these logits."""
    return loss(token_scores(hidden, Head(kernel, None, REAL, None), batch.targets), batch)


def mean_loss(loss, hidden, kernel, batch):
    """What a train step minimises."""
    values = per_position(loss, hidden, kernel, batch)
    return Mean.of(values, jnp.asarray(batch.weights)).value


@functools.cache
def value_and_gradient(loss):
    """Compiled once a loss: (mean loss, its gradient by (hidden, kernel))."""
    return jax.jit(jax.value_and_grad(functools.partial(mean_loss, loss), argnums=(0, 1)))


def table_apply(params, tokens, state=None, **_):
    """The smallest language model: a table of hidden states by token, and a head."""
    return Output(params["params"]["table"][tokens], Head(params["params"]["kernel"], None, REAL, None), (), {})


def test_every_loss_has_a_row():
    def exported(loss):
        return loss if loss in LOSSES.values() else type(loss)
    assert {exported(loss) for _, loss in ROWS} == set(LOSSES.values())


@losses
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_float32_value_a_position(loss, dtype):
    out = jax.eval_shape(functools.partial(per_position, loss), *make(dtype=dtype))
    assert out.shape == (B, T) and out.dtype == jnp.float32


@losses
def test_a_position_of_weight_zero_changes_nothing(loss):
    """Neither its logits, however large, nor its target, which may be no id at all, reach the value or the gradient."""
    hidden, kernel, batch = make()
    masked = batch.weights == 0
    grad = value_and_gradient(loss)
    value, (d_hidden, d_kernel) = grad(hidden, kernel, batch)
    wild = jnp.where(masked[..., None], 1e5 * jnp.sign(hidden), hidden)
    for target in (0, -1, 1_000_000):
        other = batch._replace(targets=np.where(masked, target, batch.targets).astype(np.int32))
        wild_value, (wild_hidden, wild_kernel) = grad(wild, kernel, other)
        np.testing.assert_allclose(wild_value, value, rtol=1e-6)
        np.testing.assert_array_equal(wild_hidden[masked], 0)
        np.testing.assert_allclose(wild_hidden, d_hidden, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(wild_kernel, d_kernel, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(d_hidden).max()) > 0


@losses
def test_a_batch_without_targets_is_zero(loss):
    hidden, kernel, batch = make()
    batch = batch._replace(weights=np.zeros((B, T), np.float32))
    value, grads = value_and_gradient(loss)(hidden, kernel, batch)
    assert float(value) == 0
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)


@losses
@pytest.mark.parametrize("scale", [0.0, 1e2, 1e5])
def test_finite_at_extreme_logits(loss, scale):
    hidden, kernel, batch = make(scale=scale)
    value, grads = value_and_gradient(loss)(hidden, kernel, batch)
    assert bool(jnp.isfinite(value)) and all(bool(jnp.isfinite(g).all()) for g in grads)


@losses
def test_gradient_equals_finite_differences(loss):
    with jax.enable_x64(True):
        hidden, kernel, batch = make(dtype=jnp.float64)
        run = jax.jit(lambda h, k: mean_loss(loss, h, k, batch))
        check_grads(run, (hidden, kernel), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@losses
def test_four_microbatches_equal_one(loss):
    """The rows hold unequal numbers of targets, so a mean of means would differ."""
    hidden, kernel, batch = make()
    params = {"params": {"table": hidden[0, 0] + jnp.arange(REAL)[:, None] * 0.1, "kernel": kernel}}
    objective = LanguageModeling({"loss": Term(loss, 0.7)})
    optimizer = build_optimizer(OptimizerOptions(name="sgd", learning_rate=0.5, schedule="constant", warmup_steps=0,
                                                 clip_norm=None), params, 10)
    state = Recipe(lambda key: params, None, optimizer).fresh(0)
    (one, report), (four, same) = (
        jax.jit(make_train_step(table_apply, objective, optimizer, microbatches=m))(state, batch) for m in (1, 4))
    np.testing.assert_allclose(same["train/loss"], report["train/loss"], rtol=1e-6)
    for a, b, before in zip(*map(jax.tree.leaves, (one.params, four.params, params)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-6)
        assert float(jnp.abs(a - before).max()) > 1e-4
