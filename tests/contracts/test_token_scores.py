"""Token scores, on which all losses stand: a numpy loop as oracle, any chunks, a mesh, and never all logits at once.

Shapes: B batch, T time, D embed_dim, V padded vocabulary of which REAL ids exist.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.batch import batch_spec
from lm.core.sharding import make_mesh
from lm.core.types import Head
from lm.losses import chunks
from lm.losses.cross_entropy import next_token, token_scores, z_loss

B, T, D, V, REAL = 4, 12, 6, 16, 11


def make(*, bias=False, softcap=None, scale=2.0):
    rng = np.random.default_rng(0)
    hidden = (scale * rng.normal(size=(B, T, D))).astype(np.float32)
    kernel = rng.normal(size=(V, D)).astype(np.float32)
    offset = rng.normal(size=V).astype(np.float32) if bias else None
    return hidden, Head(kernel, offset, REAL, softcap), rng.integers(0, REAL, (B, T)).astype(np.int32)


def oracle(hidden, head, targets):
    """(logp, logsumexp, argmax) by loops over positions and ids, in float64, over the real ids only."""
    logp, total, best = np.zeros((B, T)), np.zeros((B, T)), np.zeros((B, T), np.int32)
    for b in range(B):
        for t in range(T):
            logits = []
            for v in range(head.vocab_size):
                z = sum(float(h) * float(k) for h, k in zip(hidden[b, t], head.kernel[v], strict=True))
                z += 0.0 if head.bias is None else float(head.bias[v])
                logits.append(z if head.softcap is None else head.softcap * math.tanh(z / head.softcap))
            total[b, t] = math.log(math.fsum(math.exp(z) for z in logits))
            logp[b, t] = logits[targets[b, t]] - total[b, t]
            best[b, t] = logits.index(max(logits))
    return logp, total, best


@pytest.mark.parametrize("form", [dict(), dict(bias=True), dict(softcap=3.0), dict(bias=True, softcap=3.0)], ids=str)
@pytest.mark.parametrize("chunk", [None, 1, 5, 6, 12, 100])
def test_scores_equal_a_loop(form, chunk):
    hidden, head, targets = make(**form)
    logp, total, best = oracle(hidden, head, targets)
    scores = jax.jit(lambda h: token_scores(h, head, targets, chunk=chunk))(hidden)
    np.testing.assert_allclose(scores.logp, logp, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scores.logsumexp, total, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(scores.argmax, best)
    batch = batch_spec(B, T)._replace(targets=targets)
    np.testing.assert_allclose(next_token(scores, batch), -logp, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(z_loss(scores, batch), total**2, rtol=1e-5, atol=1e-5)


def gradient(chunk):
    """Gradient of the mean loss by (hidden, kernel)."""
    def grad(hidden, kernel, targets):
        head = Head(kernel, None, REAL, None)
        return jax.grad(lambda h, k: jnp.mean(token_scores(h, head._replace(kernel=k), targets, chunk=chunk).logp),
                        argnums=(0, 1))(hidden, kernel)
    return grad


@pytest.mark.parametrize("chunk", [1, 5, 6])
def test_gradients_do_not_depend_on_chunks(chunk):
    hidden, head, targets = make()
    whole = jax.jit(gradient(T))(hidden, head.kernel, targets)
    for a, b in zip(whole, jax.jit(gradient(chunk))(hidden, head.kernel, targets), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sizes", [{"data": 2, "context": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2},
                                   {"data": 8}, {"tensor": 8}], ids=str)  # 8 do not divide the rows
def test_chunks_on_a_mesh_equal_one_device(sizes):
    """Each device cuts its own stretch of time: rows over data, time over context, the vocabulary over tensor."""
    hidden, head, targets = make()
    alone = jax.jit(gradient(T))(hidden, head.kernel, targets)
    with jax.set_mesh(make_mesh(sizes)):
        split = jax.jit(gradient(4))(hidden, head.kernel, targets)
    for a, b in zip(alone, split, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7)


def test_devices_talk_of_the_head_once_whatever_the_chunks():
    """Where the head is split over `fsdp`, no collective stands in a loop over chunks."""
    hidden, head, targets = make()
    mesh = make_mesh({"data": 2, "fsdp": 2, "context": 2})
    place = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))
    shardings = (place(("data", "fsdp"), "context"), place(None, "fsdp"), place(("data", "fsdp"), "context"))
    with jax.set_mesh(mesh):
        text = jax.jit(gradient(2), in_shardings=shardings, out_shardings=shardings[:2]).lower(
            hidden, head.kernel, targets).compile().as_text()
    computations = dict(re.findall(r"^%?([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    loops = re.findall(r" while\(.*body=%?([\w.-]+)", text)
    collective = re.compile(r" (?:all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)")
    assert loops and collective.search(text)
    assert not [name for name in loops if collective.search(computations[name])]


def test_out_of_range_scores_are_finite():
    """Logits of +-1e30 are far beyond what exp can take."""
    hidden, head, targets = make(scale=1e30)
    scores = token_scores(hidden, head, targets)
    assert all(bool(jnp.isfinite(s).all()) for s in scores)


def largest_array(rows, length, vocab, chunk):
    """Elements of the largest array that stands anywhere in the compiled gradient."""
    arrays = (jax.ShapeDtypeStruct((rows, length, D), jnp.float32), jax.ShapeDtypeStruct((vocab, D), jnp.float32),
              jax.ShapeDtypeStruct((rows, length), jnp.int32))
    text = jax.jit(gradient(chunk)).lower(*arrays).compile().as_text()
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", text)
    return max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)


def test_chunked_loss_never_holds_all_logits(monkeypatch):
    rows, length, vocab = 2, 64, 1024
    logits = rows * length * vocab
    assert largest_array(rows, length, vocab, length) >= logits  # the measure sees them where they are
    assert largest_array(rows, length, vocab, 8) <= logits // 8
    # The default holds all where they are few enough, and else chunks of as many as may exist at a time.
    monkeypatch.setitem(chunks.CHUNK_ELEMENTS, "cpu", logits // 16)
    monkeypatch.setattr(chunks, "HELD_ELEMENTS", logits)
    assert largest_array(rows, length, vocab, None) == logits
    monkeypatch.setattr(chunks, "HELD_ELEMENTS", logits - 1)
    assert largest_array(rows, length, vocab, None) <= logits // 16


def test_all_logits_are_held_once_and_their_gradient_takes_their_place():
    """What the compiled gradient asks for besides its arguments and results, with the target's accuracy."""
    rows, length, vocab = 2, 256, 1024

    def total(hidden, kernel, targets):
        scores = token_scores(hidden, Head(kernel, None, vocab, None), targets)
        return jnp.mean(scores.logp), jnp.mean(scores.argmax == targets)

    arrays = (jax.ShapeDtypeStruct((rows, length, D), jnp.float32), jax.ShapeDtypeStruct((vocab, D), jnp.float32),
              jax.ShapeDtypeStruct((rows, length), jnp.int32))
    compiled = jax.jit(jax.grad(total, (0, 1), has_aux=True)).lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 4 * rows * length * vocab


def test_a_target_that_is_no_id_takes_no_logit():
    """What stands where weights are 0 may be anything, and must be finite."""
    hidden, head, targets = make()
    for wrong in (-1, V, 10**6):
        scores = token_scores(hidden, head, np.full_like(targets, wrong))
        np.testing.assert_allclose(scores.logp, -scores.logsumexp, rtol=1e-6)


def test_a_second_derivative_is_that_of_the_formula():
    hidden, head, targets = make()
    weights = np.random.default_rng(1).normal(size=(B, T)).astype(np.float32)

    def plain(h):
        logits = (h @ head.kernel.T)[..., :REAL]
        logp = jax.nn.log_softmax(logits, axis=-1)
        return jnp.sum(weights * jnp.square(jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]))

    def ours(h):
        return jnp.sum(weights * jnp.square(token_scores(h, head, targets, chunk=5).logp))

    twice = lambda f: jax.jit(jax.grad(lambda h: jnp.sum(jnp.sin(jax.grad(f)(h)))))(hidden)
    np.testing.assert_allclose(twice(ours), twice(plain), rtol=1e-3, atol=1e-3)
