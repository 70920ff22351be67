"""Learning from preferences: one forward pass over chosen and rejected responses together, and any preference loss.

Shape legend: B rows, T time, G groups of a row; see `lm.losses.preference.responses` for how a row holds pairs.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lm.core.batch import Batch
from lm.core.sharding import constrain
from lm.core.types import UNSCORED, Apply, Array, Carry, Key, Mean, Metrics, Params
from lm.losses.base import Term, Weight
from lm.losses.cross_entropy import token_scores
from lm.losses.preference.base import PreferenceLoss
from lm.losses.preference.measures import measures
from lm.losses.preference.reference import (
    ADAPTERS_OFF,
    BESIDE,
    CACHED,
    COPY,
    REFERENCE,
    reference_kind,
    without_adapters,
)
from lm.losses.preference.responses import CHOSEN, groups_of, sums, supervised
from lm.losses.preference.unscored import unscored, without
from lm.losses.routing import Reported
from lm.tasks.language_modeling import forward

NLL = "nll"


@dataclasses.dataclass(frozen=True)
class PreferenceObjective:
    """weight * (scale * mean of the loss over its pairs + sft * mean negative log-likelihood of the chosen responses),
    and for each of `terms` the mean over what the likelihood covers.

    name, loss, weight: of the preference loss. terms: losses of positions, and what layers report. reference: one of
    REFERENCES or None, see `reference_kind`; a copy is the carry, cached log-probabilities come with the batch.
    chunk: positions whose logits exist at a time; None picks by memory.
    """

    name: str
    loss: PreferenceLoss
    weight: Weight = 1.0
    terms: Mapping[str, Term] = dataclasses.field(default_factory=dict)
    reference: str | None = None
    chunk: int | None = None
    model_not_additive: tuple[str, ...] = ()
    carry_per_row: bool = False

    @property
    def not_additive(self) -> tuple[str, ...]:
        """What does not add up over microbatches."""
        return (*(() if self.loss.additive else (self.name,)), *self.model_not_additive)

    @property
    def weights(self) -> Mapping[str, Weight]:
        """Weight of each term."""
        own = {self.name: _scaled(self.weight, self.loss.scale)}
        if self.loss.sft:
            own[NLL] = _scaled(self.weight, self.loss.sft)
        return {**own, **{name: term.weight for name, term in self.terms.items()}}

    def counts(self, batch: Batch) -> Mapping[str, Array]:
        """What each term divides by, from the batch alone: pairs (responses, for KTO), tokens or sequences."""
        groups = groups_of(jnp.zeros(batch.tokens.shape, jnp.float32), None, batch)
        taught = supervised(batch, self.loss.sft_tokens)
        out = {self.name: jnp.sum(self.loss.counted(groups), dtype=jnp.float32)}
        if self.loss.sft:
            out[NLL] = self._likelihood(jnp.zeros_like(taught), taught, batch).count
        for name, term in self.terms.items():
            out[name] = term.loss.count(batch) if isinstance(term.loss, Reported) else taught.sum()
        return out

    def _likelihood(self, logp: Array, taught: Array, batch: Batch) -> Mean:
        """Mean negative log-likelihood over the positions [B, T] that teach: a token, or a sequence."""
        if self.loss.sft_average == "tokens":
            return Mean.of(-logp, taught)
        totals = sums(jnp.where(taught == 0, 0, -logp * taught), batch.segment_ids)[..., CHOSEN]
        sizes = sums(taught, batch.segment_ids)[..., CHOSEN]
        return Mean.of(totals / jnp.where(sizes > 0, sizes, 1), sizes > 0)

    def keeps_copy(self, adapters: bool) -> bool:
        """Whether the carry is a copy of the variables before the first step. adapters: they are what is trained."""
        return self.loss.needs_reference and reference_kind(self.reference, adapters) == COPY

    def evaluated(self, params: Params, carry: Carry) -> Params:
        """The variables that an evaluation gets: with the reference beside them where the carry is one."""
        return {**params, REFERENCE: carry} if jax.tree.leaves(carry) else params

    def reference_logp(self, apply: Apply, params: Params, carry: Carry, batch: Batch) -> Array | None:
        """[B, T] log-probabilities of the targets under the reference model, None where the loss needs none and none
        are at hand. Raises ValueError where it needs them and the batch has none."""
        kind = reference_kind(self.reference, any(name in params for name in BESIDE))
        if kind == CACHED or not self.loss.needs_reference:
            cached = getattr(batch, "reference", None)
            if cached is None and self.loss.needs_reference:
                raise ValueError(f"config.loss.reference='cached': the batch brings no log-probabilities of a "
                                 f"reference model for {self.name}; use reference='copy', or data that hold them")
            return cached
        variables = without_adapters(params) if kind == ADAPTERS_OFF else carry
        variables = jax.lax.stop_gradient(variables)
        out = forward(apply, variables, batch)
        return jax.lax.stop_gradient(token_scores(out.hidden, out.head, batch.targets, chunk=self.chunk).logp)

    def __call__(self, apply: Apply, params: Params, carry: Carry, batch: Batch,
                 key: Key | None) -> tuple[Mapping[str, Mean], Carry, Metrics]:
        """(means of the terms, carry, metrics of `measures`, what layers counted, and which groups are UNSCORED)."""
        reference = self.reference_logp(apply, params, carry, batch)
        out = forward(apply, params, batch, key)
        scores = token_scores(out.hidden, out.head, batch.targets, chunk=self.chunk)
        groups = groups_of(scores.logp, reference, batch)
        taught = supervised(batch, self.loss.sft_tokens)
        means = {self.name: Mean.of(self.loss(groups), self.loss.counted(groups))}
        if self.loss.sft:
            means[NLL] = self._likelihood(scores.logp, taught, batch)
        for name, term in self.terms.items():
            means[name] = (term.loss.mean(out.aux, batch) if isinstance(term.loss, Reported)
                           else Mean.of(term.loss(scores, batch), taught))
        tally = {"tally": out.aux["tally"]} if "tally" in out.aux else {}
        teaches = len(means) > 1
        marked = unscored(groups, *((taught, scores.logp, batch.segment_ids) if teaches else ()))
        # Each process tells of its own rows.
        return means, carry, {**measures(self.loss, groups), **tally, UNSCORED: constrain(marked, "batch", None)}

    def without(self, batch: Batch, marked: Array) -> Batch:
        """The batch without the groups that are marked, [B, G]."""
        return without(batch, marked)


def _scaled(weight: Weight, factor: float) -> Weight:
    if callable(weight):
        return lambda step: factor * weight(step)
    return factor * weight
