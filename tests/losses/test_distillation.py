"""Distillation: the divergence of numpy's definition, exact where every token is named, the tail never cancelled."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.batch import TaughtBatch
from lm.core.types import Head, Output
from lm.losses.base import Term
from lm.losses.cross_entropy import next_token, token_scores
from lm.losses.distillation import Distill, named_logp, taught_scores
from lm.tasks.build import build_objective, resolve_loss
from lm.tasks.language_modeling import LanguageModeling

B, T, D, V, REAL, K = 3, 5, 4, 12, 10, 3
RNG = np.random.default_rng(0)


def softmax(logits, temperature):
    e = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return e / e.sum(-1, keepdims=True)


def make(k=K, temperature=1.0):
    """(hidden, head, batch with the k best of a drawn teacher, the teacher's probabilities [B, T, REAL])."""
    hidden, kernel = RNG.normal(size=(B, T, D)).astype(np.float32), RNG.normal(size=(V, D)).astype(np.float32)
    p = softmax(2 * RNG.normal(size=(B, T, REAL)), temperature)
    ids = np.argsort(-p, axis=-1)[..., :k].astype(np.int32)
    named = np.take_along_axis(p, ids, -1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(1 - named.sum(-1, keepdims=True), 0) if k < REAL else np.zeros((B, T, 1)))
    logp = np.concatenate([np.log(named), tail], -1).astype(np.float32)
    weights = (RNG.random((B, T)) < 0.7).astype(np.float32)
    targets = RNG.integers(0, REAL, (B, T)).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    batch = TaughtBatch(targets, targets, weights, np.ones((B, T), np.int32), positions, ids, logp)
    return jnp.asarray(hidden), Head(jnp.asarray(kernel), None, REAL, None), batch, p


def student(hidden, head, temperature):
    return softmax(np.asarray(hidden) @ np.asarray(head.kernel)[:REAL].T, temperature).astype(np.float64)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_values_are_those_of_a_loop(tail, temperature):
    hidden, head, batch, p = make(temperature=temperature)
    loss = Distill(temperature, tail)
    _, logp = taught_scores(hidden, head, batch, temperature)
    got = loss(logp, batch)
    q = student(hidden, head, temperature)
    for b in range(B):
        for t in range(T):
            ids = batch.teacher_ids[b, t]
            ps, qs = list(p[b, t, ids]), list(q[b, t, ids])
            if tail == "bucket":
                ps, qs = [*ps, 1 - sum(ps)], [*qs, 1 - sum(qs)]
            else:
                ps, qs = [x / sum(ps) for x in ps], [x / sum(qs) for x in qs]
            want = temperature**2 * sum(x * np.log(x / y) for x, y in zip(ps, qs, strict=True))
            assert got[b, t] == pytest.approx(want, rel=2e-4, abs=1e-5)


def test_with_every_token_named_it_is_the_whole_divergence_and_its_gradient():
    hidden, head, batch, p = make(k=REAL)

    def mean(hidden):
        return jnp.sum(Distill()(taught_scores(hidden, head, batch, 1.0)[1], batch))

    value, grad = jax.value_and_grad(mean)(hidden)
    q = student(hidden, head, 1.0)
    assert value == pytest.approx((p * np.log(p / q)).sum(), rel=1e-4)
    np.testing.assert_allclose(grad, (q - p) @ np.asarray(head.kernel)[:REAL], rtol=1e-3, atol=1e-4)


def test_the_bucket_is_a_lower_bound_that_grows_with_k():
    hidden, head, batch, p = make(k=REAL)
    values = []
    for k in (1, 3, 6, REAL):
        ids = batch.teacher_ids[..., :k]
        named = np.take_along_axis(p, ids, -1)
        with np.errstate(divide="ignore", invalid="ignore"):
            tail = np.log(np.maximum(1 - named.sum(-1, keepdims=True), 0)) if k < REAL else np.full((B, T, 1), -np.inf)
        logp = np.concatenate([np.log(named), tail], -1).astype(np.float32)
        part = batch._replace(teacher_ids=ids, teacher_logp=logp)
        values.append(np.asarray(Distill()(taught_scores(hidden, head, part, 1.0)[1], part)))
    for smaller, larger in itertools.pairwise(values):
        assert (smaller <= larger + 1e-5).all()
    assert values[0].min() >= -1e-6


def test_a_student_like_the_teacher_has_no_loss_and_no_gradient():
    hidden, head, batch, _ = make()
    logits = np.asarray(hidden) @ np.asarray(head.kernel).T
    own = named_logp(jnp.where(jnp.arange(V) < REAL, logits, -jnp.inf), batch.teacher_ids, 2.0, REAL)
    batch = batch._replace(teacher_logp=own)
    total = lambda h: jnp.sum(Distill(2.0)(taught_scores(h, head, batch, 2.0)[1], batch))
    value, grad = jax.value_and_grad(total)(hidden)
    assert abs(float(value)) < 1e-5 and float(jnp.abs(grad).max()) < 1e-5


def test_a_tail_of_next_to_nothing_is_exact():
    logits = jnp.asarray([[30.0, 0.0, -1.0, -2.0]])
    logp = named_logp(logits, jnp.asarray([[0]]), 1.0, 4)
    want = np.log(np.exp([0.0, -1.0, -2.0]).sum()) - 30.0
    assert logp[0, 1] == pytest.approx(want, rel=1e-6)  # 1 - p is 0 in float32
    grad = jax.grad(lambda x: named_logp(x, jnp.asarray([[0]]), 1.0, 4)[0, 1])(logits)
    assert np.isfinite(grad).all() and float(grad[0, 0]) == pytest.approx(-1.0, rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_change_nothing(chunk):
    hidden, head, batch, _ = make()
    whole, parts = taught_scores(hidden, head, batch, 1.0), taught_scores(hidden, head, batch, 1.0, chunk=chunk)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(whole[0].logp, token_scores(hidden, head, batch.targets).logp)


def test_the_objective_adds_it_to_next_token_and_ignores_positions_of_weight_zero():
    hidden, head, batch, _ = make()
    apply = lambda params, tokens, state=None, **_: Output(params, head, (), {})
    objective = LanguageModeling({"distill": Term(Distill(), 0.9), "next_token": Term(next_token, 0.1)})

    def total(hidden, batch):
        means, _, _ = objective(apply, hidden, (), batch, None)
        return 0.9 * means["distill"].value + 0.1 * means["next_token"].value

    grad = jax.jit(jax.value_and_grad(total))
    value, gradient = grad(hidden, batch)
    masked = batch.weights == 0
    wild = batch._replace(teacher_ids=np.where(masked[..., None], 0, batch.teacher_ids),
                          teacher_logp=np.where(masked[..., None], -1.5, batch.teacher_logp))
    again, other = grad(jnp.where(masked[..., None], 1e4, hidden), wild)
    assert again == pytest.approx(float(value), rel=1e-6)
    np.testing.assert_array_equal(other[masked], 0)
    np.testing.assert_allclose(other, gradient, rtol=1e-5, atol=1e-7)


def test_a_config_names_it():
    made = build_objective({"distill": {"weight": 0.5, "temperature": 2.0}, "next_token": 0.5})
    assert made.terms["distill"] == Term(Distill(2.0), 0.5)
    assert resolve_loss({"distill": 1.0})["distill"] == {"weight": 1.0, "temperature": 1.0, "tail": "bucket"}
    with pytest.raises(ValueError, match="must be above 0"):
        resolve_loss({"distill": {"temperature": 0.0}})
    with pytest.raises(ValueError, match="no predictions of a teacher"):
        resolve_loss({"distill": 1.0, "orpo": 1.0})
