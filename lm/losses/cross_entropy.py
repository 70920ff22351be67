"""Token scores in one chunked pass over hidden states and head, and the losses that need nothing else.

Shape legend: B batch, T time, D embed_dim, V padded vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.batch import Batch
from lm.core.sharding import axis_size, platform
from lm.core.types import Array, Head, TokenScores
from lm.losses.chunks import over_chunks


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


def next_token(scores: TokenScores, batch: Batch) -> Array:
    """-log p(target), in nats, [B, T]."""
    return -scores.logp


def z_loss(scores: TokenScores, batch: Batch) -> Array:
    """log(Z)^2, which keeps the partition function near 1 (Chowdhery et al. 2022, PaLM, section 5), [B, T]."""
    return jnp.square(scores.logsumexp)
