"""Token scores in one chunked pass over hidden states and head, and the losses that need nothing else.

Shape legend: B batch, T time, D embed_dim, V padded vocabulary, N = B * T, C chunk of positions.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.batch import Batch
from lm.core.head import logits_of
from lm.core.sharding import axis_size, constrain
from lm.core.types import Array, Head, TokenScores

# Logits held at a time: 2^22 numbers, 16 MB in float32.
CHUNK_ELEMENTS = 1 << 22


def scores_of(logits: Array, targets: Array) -> TokenScores:
    """Scores of targets [...] under logits [..., V]."""
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    logsumexp = jnp.log(jnp.sum(jnp.exp(logits - peak), axis=-1)) + peak[..., 0]
    # A comparison with an iota, not a gather: it stays local where the vocabulary is split over devices.
    chosen = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    target_logit = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    return TokenScores(target_logit - logsumexp, logsumexp, jnp.argmax(logits, axis=-1).astype(jnp.int32))


def token_scores(hidden: Array, head: Head, targets: Array, *, chunk: int | None = None) -> TokenScores:
    """Scores of `targets` [B, T] given hidden states [B, T, D], never holding logits of more than `chunk` positions a
    row; the backward pass computes each chunk's logits again.

    chunk: see `over_chunks`. Values do not depend on it beyond rounding.
    """
    return over_chunks(scores_of, hidden, head, targets, chunk=chunk)


def over_chunks(score: Callable[[Array, Any], Any], hidden: Array, head: Head, beside: Any, *,
                chunk: int | None = None) -> Any:
    """`score(logits, beside)` of all positions, a chunk of them at a time, made again in the backward pass.

    beside: tree of arrays [B, T, ...], what each position needs besides its logits. score: of logits [B, C, V], gives a
    tree of arrays [B, C, ...]. chunk: positions of T at a time and device; None picks the largest that holds at most
    CHUNK_ELEMENTS logits a device.
    """
    B, T, _ = hidden.shape
    V = head.kernel.shape[0]
    shards = axis_size("context") if T % axis_size("context") == 0 else 1
    local = T // shards  # positions that one device holds of a row
    if chunk is None:
        rows = math.ceil(B / axis_size("data", "fsdp"))
        chunk = max(1, CHUNK_ELEMENTS // (rows * math.ceil(V / axis_size("tensor"))))
    one = lambda hidden, beside: score(constrain(logits_of(hidden, head), "batch", "length", "vocab"), beside)
    if chunk >= local:
        return one(hidden, beside)
    count = math.ceil(local / chunk)
    chunk = math.ceil(local / count)

    def cut(a):
        """[B, T, ...] to [count, B, shards * chunk, ...]: every device cuts its own stretch of time."""
        a = a.reshape(B, shards, local, *a.shape[2:])
        a = jnp.pad(a, ((0, 0), (0, 0), (0, count * chunk - local)) + ((0, 0),) * (a.ndim - 3))
        a = jnp.moveaxis(a.reshape(B, shards, count, chunk, *a.shape[3:]), 2, 0)
        return a.reshape(count, B, shards * chunk, *a.shape[4:])

    def join(a):
        a = jnp.moveaxis(a.reshape(count, B, shards, chunk, *a.shape[3:]), 0, 2)
        return a.reshape(B, shards, count * chunk, *a.shape[4:])[:, :, :local].reshape(B, T, *a.shape[4:])

    # The map closes over the head, so its gradient is summed over chunks in one buffer.
    remade = jax.checkpoint(lambda part: one(*part))
    return jax.tree.map(join, jax.lax.map(remade, (cut(hidden), jax.tree.map(cut, beside))))


def next_token(scores: TokenScores, batch: Batch) -> Array:
    """-log p(target), in nats, [B, T]."""
    return -scores.logp


def z_loss(scores: TokenScores, batch: Batch) -> Array:
    """log(Z)^2, which keeps the partition function near 1 (Chowdhery et al. 2022, PaLM, section 5), [B, T]."""
    return jnp.square(scores.logsumexp)
