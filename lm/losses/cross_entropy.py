"""Token scores in one chunked pass over hidden states and head, and the losses that need nothing else.

Shape legend: B batch, T time, D embed_dim, V padded vocabulary, N = B * T, C chunk of positions.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.batch import Batch
from lm.core.head import logits_of
from lm.core.sharding import axis_size, constrain, current_mesh, platform
from lm.core.types import Array, Head, TokenScores

# Logits held at a time where those of all positions are too many: 2^22 numbers, 16 MB in float32.
CHUNK_ELEMENTS = 1 << 22
# The most that a step on a CPU holds from the forward to the backward pass: 1 GiB in float32, over all its devices.
HELD_ELEMENTS = 1 << 28


@jax.custom_jvp
def scores_of(logits: Array, targets: Array) -> TokenScores:
    """Scores of targets [...] under logits [..., V]. Of the logits the backward pass needs one array, and turns it into
    their gradient where it lies."""
    peak = jnp.max(logits, axis=-1, keepdims=True)
    logsumexp = jnp.log(jnp.sum(jnp.exp(logits - peak), axis=-1)) + peak[..., 0]
    if platform() == "cpu" and axis_size("tensor") == 1:
        at = jnp.clip(targets, 0, logits.shape[-1] - 1)[..., None]
        target_logit = jnp.where(targets == at[..., 0], jnp.take_along_axis(logits, at, axis=-1)[..., 0], 0.0)
    else:  # Not a gather: it stays local where the vocabulary is split. A CPU would write the whole selection down.
        target_logit = _select(logits, targets)
    return TokenScores(target_logit - logsumexp, logsumexp, jnp.argmax(logits, axis=-1).astype(jnp.int32))


def _select(values: Array, targets: Array) -> Array:
    """values [..., V] at the targets [...], by a comparison with an iota; 0 where a target is no id."""
    chosen = jnp.arange(values.shape[-1], dtype=targets.dtype) == targets[..., None]
    return jnp.sum(jnp.where(chosen, values, 0.0), axis=-1)


@scores_of.defjvp
def _scores_tangent(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[TokenScores, TokenScores]:
    """The derivative of logsumexp by the logits is their softmax, which is written with it, so that nothing else of the
    forward pass is kept."""
    logits, targets = primals
    scores = scores_of(logits, targets)
    total = jnp.sum(jnp.exp(logits - scores.logsumexp[..., None]) * tangents[0], axis=-1)
    none = np.zeros(scores.argmax.shape, jax.dtypes.float0)
    return scores, TokenScores(_select(tangents[0], targets) - total, total, none)


def token_scores(hidden: Array, head: Head, targets: Array, *, chunk: int | None = None) -> TokenScores:
    """Scores of `targets` [B, T] given hidden states [B, T, D], never holding logits of more than `chunk` positions a
    row; where that is not all of them, the backward pass computes each chunk's logits again.

    chunk: see `over_chunks`. Values do not depend on it beyond rounding.
    """
    return over_chunks(scores_of, hidden, head, targets, chunk=chunk)


def over_chunks(score: Callable[[Array, Any], Any], hidden: Array, head: Head, beside: Any, *,
                chunk: int | None = None) -> Any:
    """`score(logits, beside)` of all positions: at once, or a chunk of them at a time, made again in the backward pass.

    beside: tree of arrays [B, T, ...], what each position needs besides its logits. score: of logits [..., V], gives a
    tree of arrays [..., ...]. chunk: positions of T at a time and device; all of T keeps all logits for the backward
    pass, which saves it a quarter of the head's products. None is all of T on a CPU where that is at most HELD_ELEMENTS
    logits, else the most of which there are at most CHUNK_ELEMENTS a device.
    """
    B, T, _ = hidden.shape
    V = head.kernel.shape[0]
    shards = axis_size("context") if T % axis_size("context") == 0 else 1
    local = T // shards  # positions that one device holds of a row
    if chunk is None:
        held = B * T * V <= HELD_ELEMENTS and platform() == "cpu"
        a_position = math.ceil(B / axis_size("data", "fsdp")) * math.ceil(V / axis_size("tensor"))
        chunk = local if held else max(1, CHUNK_ELEMENTS // a_position)

    def one(hidden: Array, beside: Any) -> Any:
        if current_mesh() is not None:
            return score(constrain(logits_of(hidden, head), "batch", "length", "vocab"), beside)
        # In two dimensions, as the product gives them: XLA's CPU backend then writes their gradient over the logits.
        rows, length = hidden.shape[:2]
        flat = lambda a: a.reshape(rows * length, *a.shape[2:])
        found = score(logits_of(flat(hidden), head), jax.tree.map(flat, beside))
        return jax.tree.map(lambda a: a.reshape(rows, length, *a.shape[1:]), found)

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
