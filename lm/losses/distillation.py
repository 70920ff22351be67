"""Learning a teacher's predictions from its most probable tokens (Hinton et al. 2015, arXiv:1503.02531).

Shape legend: B batch, T time, V vocabulary, k tokens that the teacher's cache names.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from lm.core.batch import TaughtBatch
from lm.core.fields import option
from lm.core.types import Array, Head, TokenScores
from lm.losses.chunks import over_chunks
from lm.losses.cross_entropy import scores_of


@dataclasses.dataclass(frozen=True)
class Distill:
    """temperature^2 * KL(teacher || student) a position, in nats, both with their logits divided by `temperature`.

    temperature: that of the cache; the factor keeps gradients as large as those of next_token (section 2).
    tail: what becomes of the tokens that the cache does not name. "bucket": they are one outcome more, with the rest of
      each one's probability; the student is held to how much it gives to them together, and free in how. (A lower bound
      of the whole divergence, reached with equality at the same tail.) "renormalize": both are taken as distributions
      over the named tokens alone, and what the student gives to others costs nothing.
    """

    temperature: float = option(1.0, "divides the logits of both; that of the teacher's predictions")
    tail: Literal["bucket", "renormalize"] = option("bucket", "the tokens that are not named: one outcome more, or "
                                                    "left out of both")

    def check(self) -> None:
        """Raises ValueError for a temperature that is not above 0."""
        if not self.temperature > 0:
            raise ValueError(f"config.loss.distill.temperature must be above 0; got {self.temperature}")

    def __call__(self, student: Array, batch: TaughtBatch) -> Array:
        """[B, T] from the student's log-probabilities [B, T, k + 1] of the named tokens and of all others together."""
        teacher = batch.teacher_logp
        if self.tail == "renormalize":
            teacher, student = (jax.nn.log_softmax(logp[..., :-1], axis=-1) for logp in (teacher, student))
        # What the teacher gives nothing to counts nothing, whatever the student gives.
        certain = teacher > -jnp.inf
        difference = jnp.where(certain, teacher, 0.0) - jnp.where(certain, student, 0.0)
        return self.temperature**2 * jnp.sum(jnp.where(certain, jnp.exp(teacher), 0.0) * difference, axis=-1)


def taught_scores(hidden: Array, head: Head, batch: TaughtBatch, temperature: float, *,
                  chunk: int | None = None) -> tuple[TokenScores, Array]:
    """(scores of the targets, log-probabilities [B, T, k + 1] of the teacher's tokens at `temperature`), from one pass
    over the logits. The last is that of all other tokens together, minus infinity where there is none."""
    def score(logits: Array, beside: tuple[Array, Array]) -> tuple[TokenScores, Array]:
        targets, ids = beside
        return scores_of(logits, targets), named_logp(logits, ids, temperature, head.vocab_size)

    return over_chunks(score, hidden, head, (batch.targets, batch.teacher_ids), chunk=chunk)


def named_logp(logits: Array, ids: Array, temperature: float, vocab_size: int) -> Array:
    """log softmax(logits / temperature) at `ids` [..., k], all different, and of the rest together: [..., k + 1].

    The rest is summed from its own logits, so that nothing cancels where the named tokens have nearly everything.
    """
    logits = logits / temperature
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    named = jnp.take_along_axis(logits, ids, axis=-1) - total
    if ids.shape[-1] >= vocab_size:
        return jnp.concatenate([named, jnp.full_like(total, -jnp.inf)], axis=-1)
    others = jnp.put_along_axis(logits, ids, -jnp.inf, axis=-1, inplace=False)
    return jnp.concatenate([named, jax.nn.logsumexp(others, axis=-1, keepdims=True) - total], axis=-1)
