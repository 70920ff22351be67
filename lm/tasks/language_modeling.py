"""Language modelling: one forward pass, any sum of per-position losses over weighted targets."""

import dataclasses
from collections.abc import Mapping

from lm.core.batch import Batch
from lm.core.types import Apply, Array, Carry, Key, Mean, Metrics, Output, Params, State, TokenScores
from lm.losses.base import Term, Weight
from lm.losses.cross_entropy import token_scores
from lm.losses.distillation import Distill, taught_scores
from lm.losses.routing import Reported
from lm.tasks.goldfish import apart


@dataclasses.dataclass(frozen=True)
class LanguageModeling:
    """Objective: for each term, the mean of its loss over the targets, weighted by `batch.weights`.

    chunk: positions whose logits exist at a time; None picks by memory. carry_per_row: rows go on from the model's
    state after the batch before, which is the carry; else they start fresh.
    """

    terms: Mapping[str, Term]
    chunk: int | None = None
    carry_per_row: bool = False
    not_additive: tuple[str, ...] = ()

    @property
    def weights(self) -> Mapping[str, Weight]:
        """Weight of each term."""
        return {name: term.weight for name, term in self.terms.items()}

    def counts(self, batch: Batch) -> Mapping[str, Array]:
        """The weight that each term divides by, from the batch alone."""
        count = batch.weights.sum()
        return {name: term.loss.count(batch) if isinstance(term.loss, Reported) else count
                for name, term in self.terms.items()}

    def __call__(self, apply: Apply, params: Params, carry: Carry, batch: Batch,
                 key: Key | None) -> tuple[Mapping[str, Mean], Carry, Metrics]:
        """(means of the terms, carry, {"accuracy": share of targets that are the most probable token, "tally": what the
        layers counted, where they do}), and of a batch with a mask what `apart` says."""
        out = forward(apply, params, batch, key, carry if self.carry_per_row else None)
        distill = next((term.loss for term in self.terms.values() if isinstance(term.loss, Distill)), None)
        if distill is None:
            scores, student = token_scores(out.hidden, out.head, batch.targets, chunk=self.chunk), None
        else:
            scores, student = taught_scores(out.hidden, out.head, batch, distill.temperature, chunk=self.chunk)
        means = {name: term.loss.mean(out.aux, batch) if isinstance(term.loss, Reported) else
                 Mean.of(term.loss(student if term.loss is distill else scores, batch), batch.weights)
                 for name, term in self.terms.items()}
        after = out.state if self.carry_per_row else carry
        tally = {"tally": out.aux["tally"]} if "tally" in out.aux else {}
        return means, after, {"accuracy": Mean.of(scores.argmax == batch.targets, batch.weights),
                              **apart(scores, batch), **tally}


def forward(apply: Apply, params: Params, batch: Batch, key: Key | None = None, state: State = None) -> Output:
    """The model's output on a batch of packed documents, which go on from `state` where there is one."""
    return apply(params, batch.tokens, state, reset=batch.reset, positions=batch.positions, weights=batch.present,
                 key=key)


def score_batch(apply: Apply, params: Params, batch: Batch, key: Key | None = None,
                chunk: int | None = None) -> TokenScores:
    """Scores of every target of a batch of packed documents, from fresh states."""
    out = forward(apply, params, batch, key)
    return token_scores(out.hidden, out.head, batch.targets, chunk=chunk)
