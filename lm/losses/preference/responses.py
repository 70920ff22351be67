"""Responses and their scores: from log-probabilities of positions to one number a response.

A row of pairs holds documents in groups of three numbers: segment 3 g + 1 is the prompt with the chosen (or desirable)
response of group g, 3 g + 2 with the rejected (undesirable) one, 3 g + 3 with the response to another prompt, which KTO
needs. Any of them may be missing. So a pair never leaves its row, and rows are split over devices and microbatches as
those of text are.

Shape legend: B rows, T time, G groups of a row (T of them: no group is shorter than a token).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.core.batch import Batch
from lm.core.types import Array

CHOSEN, REJECTED, MISMATCHED = range(3)
KINDS = 3


class Responses(NamedTuple):
    """One response an entry, each field [...] of one shape.

    logp: sum of the log-probabilities of its tokens, nats. length: number of them (the sum of their weights).
    reference: the sum under the reference model, or None. present: bool, whether there is one, with at least one token.
    """

    logp: Array
    length: Array
    reference: Array | None
    present: Array

    @property
    def mean_logp(self) -> Array:
        """Log of the geometric mean of the token probabilities; 0 where there is no response."""
        return self.logp / jnp.where(self.present, self.length, 1)

    @property
    def ratio(self) -> Array:
        """log pi(y|x) - log pi_ref(y|x). Raises ValueError without a reference."""
        if self.reference is None:
            raise ValueError("this loss compares with a reference model; give its log-probabilities")
        return self.logp - self.reference

    @property
    def mean_ratio(self) -> Array:
        """The ratio a token."""
        return self.ratio / jnp.where(self.present, self.length, 1)


class Groups(NamedTuple):
    """The responses of each group, entries of one shape."""

    chosen: Responses
    rejected: Responses
    mismatched: Responses

    @property
    def paired(self) -> Array:
        """[...] bool: both responses of a pair are there."""
        return self.chosen.present & self.rejected.present


def pairs_of(chosen_logp: Array, rejected_logp: Array, chosen_length: Array, rejected_length: Array,
             chosen_reference: Array | None = None, rejected_reference: Array | None = None) -> Groups:
    """Pairs from summed log-probabilities [...] and lengths, for losses that are used outside of a batch."""
    def responses(logp, length, reference):
        wide = jnp.promote_types(jnp.asarray(logp).dtype, jnp.float32)
        length = jnp.asarray(length, wide)
        return Responses(jnp.asarray(logp, wide), length, reference, length > 0)

    none = jnp.zeros_like(jnp.asarray(chosen_logp))
    return Groups(responses(chosen_logp, chosen_length, chosen_reference),
                  responses(rejected_logp, rejected_length, rejected_reference),
                  responses(none, none, None if chosen_reference is None else none))


def sums(values: Array, segment_ids: Array) -> Array:
    """Sums of values [B, T] over each segment of a row, [B, G, KINDS]; padding (segment 0) is left out."""
    T = values.shape[1]
    where = jnp.where(segment_ids > 0, segment_ids - 1, KINDS * T)
    add = jax.vmap(lambda row, at: jax.ops.segment_sum(row, at, num_segments=KINDS * T + 1))
    return add(values, where)[:, :-1].reshape(-1, T, KINDS)


def groups_of(logp: Array, reference: Array | None, batch: Batch) -> Groups:
    """The groups of a batch, [B, G], from the log-probabilities of its targets [B, T].

    What stands at positions of weight 0 does not count, whatever it is.
    """
    weights = jnp.asarray(batch.weights, jnp.promote_types(logp.dtype, jnp.float32))
    weighted = lambda values: sums(jnp.where(weights == 0, 0, values.astype(weights.dtype) * weights),
                                   batch.segment_ids)
    total, length = weighted(logp), sums(weights, batch.segment_ids)
    under = None if reference is None else weighted(reference)
    return Groups(*(Responses(total[..., kind], length[..., kind], None if under is None else under[..., kind],
                              length[..., kind] > 0) for kind in range(KINDS)))


def kind_of(segment_ids: Array) -> Array:
    """[B, T]: CHOSEN, REJECTED or MISMATCHED; -1 for padding."""
    return jnp.where(segment_ids > 0, (segment_ids - 1) % KINDS, -1)


def supervised(batch: Batch, tokens: str) -> Array:
    """[B, T] float32, where the chosen response teaches by itself (SFT): on its own tokens ("response"), or on those of
    its prompt too ("all")."""
    weights = jnp.asarray(batch.weights, jnp.float32)
    if tokens == "all":
        ids = jnp.asarray(batch.segment_ids)
        following = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
        weights = jnp.where(weights > 0, weights, (following == ids).astype(jnp.float32))
    return jnp.where(kind_of(batch.segment_ids) == CHOSEN, weights, 0)
