"""How well a model tells chosen from rejected responses, beside what their lengths alone would tell.

Shape legend: B rows, T time, G groups of a row, N pairs of a set.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.batch import Batch
from lm.core.sharding import constrain
from lm.core.types import Apply, Array, Key, Mean, Output, Params
from lm.data.preference.places import first_of
from lm.eval.membership import auc
from lm.eval.sets import EvalSet
from lm.losses.cross_entropy import token_scores
from lm.losses.preference.base import PreferenceLoss
from lm.losses.preference.odds import log_odds
from lm.losses.preference.reference import divergence, split_reference
from lm.losses.preference.responses import Groups, groups_of, supervised
from lm.losses.preference.unscored import positions_of, unscored

log = logging.getLogger(__name__)
Z95 = 1.959964


@dataclasses.dataclass(frozen=True)
class Preference:
    """Evaluator of sets of pairs: `eval/<set>/...` of

      loss: mean negative log-likelihood of the chosen responses a token; accuracy: share of pairs whose chosen response
      has the larger reward of `loss` (ties count half), with its interval of 95% (`accuracy_low`, `accuracy_high`);
      logp_accuracy: the same by mean log-probability; length_baseline: what the better of "the longer wins" and "the
      shorter wins" reaches, which longer_wins tells apart; chosen_logp, rejected_logp, logp_margin (a token),
      log_odds_ratio, reward_margin, chosen_length, rejected_length; pairs; nonfinite_pairs, whose log-probabilities
      are not finite: they count as wrong, are left out of every other mean, and a warning names the first of them;
      with a reference kl, KL(model || reference) of the next token at the chosen responses' positions, and log_ratio.

    place: puts a batch on the devices; None leaves it to `jit`. The variables may hold the reference beside the model's
    own, or adapters without which they are it; a batch may bring the reference's log-probabilities. Without any, a loss
    that needs one is judged by mean log-probabilities.

    A set without any pair, of responses that stand alone, is measured a side: what of the above is of chosen or
    rejected responses by themselves, margins of their means, and reward_auc, the probability that a chosen one has a
    larger reward than a rejected one.

    on_nonfinite: "refuse" raises ValueError in place of that warning, after the whole set. Raises ValueError for a set
    without responses.
    """

    sets: Mapping[str, EvalSet]
    loss: PreferenceLoss
    place: Callable[[Batch], Batch] | None = None
    chunk: int | None = None
    on_nonfinite: Literal["skip", "refuse"] = "skip"

    def __call__(self, apply: Apply, params: Params, key: Key | None = None) -> Iterator[tuple[str, float]]:
        for name, given in self.sets.items():
            for metric, value in self.measure(apply, params, given, name).items():
                yield f"eval/{name}/{metric}", value

    def measure(self, apply: Apply, params: Params, given: EvalSet, name: str = "the set") -> dict[str, float]:
        """The metrics of one set."""
        found, totals, bad, rows = [], {}, [], 0
        for batch in given.batches():
            batch = batch if self.place is None else self.place(batch)
            pairs, means = jax.device_get(score_pairs(apply, params, batch, self.loss, self.chunk))
            there = pairs["chosen"] | pairs["rejected"]
            bad += [(rows + int(row), int(group)) for row, group in np.argwhere(there & ~pairs["finite"])]
            rows += len(there)
            found.append({key: values[there] for key, values in pairs.items()})
            for key, mean in means.items():
                before = totals.get(key, (0.0, 0.0))
                totals[key] = (before[0] + float(mean.total), before[1] + float(mean.count))
        self.tell(bad, given, name)
        groups = {key: np.concatenate([one[key] for one in found]).astype(np.float64) for key in found[0]}
        if not len(groups["chosen"]):
            raise ValueError("an evaluation set holds no chosen or rejected response")
        paired = (groups["chosen"] > 0) & (groups["rejected"] > 0)
        pairs = {key: values[paired] for key, values in groups.items()}
        own = metrics_of(pairs) if paired.any() else sides_of(groups)
        return {**{key: total / count for key, (total, count) in totals.items() if count}, **own}

    def tell(self, bad: Sequence[tuple[int, int]], given: EvalSet, name: str) -> None:
        """Names the (row, group) of a set that are not finite, where there are any."""
        if not bad:
            return
        place = lambda row, group: f"row {row}, pair {group}" if given.places is None else given.places(row)[group]
        what = (f"{name}: {len(bad)} of the pairs have log-probabilities that are not finite: "
                f"{first_of([place(*one) for one in bad])}")
        if self.on_nonfinite == "refuse":
            raise ValueError(f"{what}; mend the model, or its reference")
        if jax.process_index() == 0:
            log.warning("%s; they count as wrong, and in no mean", what)


@functools.partial(jax.jit, static_argnames=("apply", "loss", "chunk"))
def score_pairs(apply: Apply, params: Params, batch: Batch, loss: PreferenceLoss,
                chunk: int | None) -> tuple[dict[str, Array], dict[str, Mean]]:
    """(values of every group [B, G], a side's where `chosen` or `rejected` is there; sums over tokens) of one batch."""
    batch = jax.tree.map(lambda field: constrain(field, "batch", "length"), batch)
    own, beside = split_reference(params)
    run = lambda variables: apply(variables, batch.tokens, reset=batch.reset, positions=batch.positions,
                                  weights=batch.present)
    out = run(own)
    logp = token_scores(out.hidden, out.head, batch.targets, chunk=chunk).logp
    reference = getattr(batch, "reference", None)
    other: Output | None = None if beside is None else run(beside)
    if other is not None:
        reference = token_scores(other.hidden, other.head, batch.targets, chunk=chunk).logp
    groups = groups_of(logp, reference, batch)
    marked = unscored(groups)
    taught = jnp.where(positions_of(marked, batch.segment_ids), 0, supervised(batch, "response"))
    means = {"loss": Mean.of(-logp, taught)}
    if other is not None:
        means["kl"] = Mean.of(divergence(out, other), taught)
    if reference is not None:
        means["log_ratio"] = Mean.of(logp - reference, taught)
    pairs = {**values_of(loss, groups), "finite": ~marked}
    return jax.tree.map(lambda leaf: constrain(leaf, *[None] * leaf.ndim), (pairs, means))


def values_of(loss: PreferenceLoss, groups: Groups) -> dict[str, Array]:
    """What is kept of each group."""
    chosen, rejected = groups.chosen, groups.rejected
    known = chosen.reference is not None or not loss.needs_reference
    reward = loss.reward if known else lambda responses: responses.mean_logp
    return {"chosen": chosen.present, "rejected": rejected.present,
            "chosen_logp": chosen.mean_logp, "rejected_logp": rejected.mean_logp,
            "chosen_reward": reward(chosen), "rejected_reward": reward(rejected),
            "log_odds_ratio": log_odds(chosen.mean_logp) - log_odds(rejected.mean_logp),
            "chosen_length": chosen.length, "rejected_length": rejected.length}


def metrics_of(pairs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Metrics of pairs [N], see `Preference`."""
    n = len(pairs["chosen"])
    finite = pairs["finite"] > 0
    wins = np.where(finite, share_of(pairs["chosen_reward"] - pairs["rejected_reward"]), 0)
    longer = share_of(pairs["chosen_length"] - pairs["rejected_length"])
    low, high = interval(float(wins.mean()), n)
    mean = lambda name: float(pairs[name][finite].mean()) if finite.any() else math.nan
    return {
        "accuracy": float(wins.mean()), "accuracy_low": low, "accuracy_high": high,
        "logp_accuracy": float(np.where(finite, share_of(pairs["chosen_logp"] - pairs["rejected_logp"]), 0).mean()),
        "longer_wins": float(longer.mean()), "length_baseline": float(max(longer.mean(), 1 - longer.mean())),
        "chosen_logp": mean("chosen_logp"), "rejected_logp": mean("rejected_logp"),
        "logp_margin": mean("chosen_logp") - mean("rejected_logp"), "log_odds_ratio": mean("log_odds_ratio"),
        "reward_margin": mean("chosen_reward") - mean("rejected_reward"), "chosen_length": mean("chosen_length"),
        "rejected_length": mean("rejected_length"), "pairs": float(n), "nonfinite_pairs": float(n - finite.sum())}


def sides_of(groups: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Metrics of responses that stand alone [N], see `Preference`; of a side that has none there is nothing."""
    sides = {side: (groups[side] > 0) & (groups["finite"] > 0) for side in ("chosen", "rejected")}
    out = {f"{side}_{name}": float(groups[f"{side}_{name}"][there].mean()) for side, there in sides.items()
           for name in ("logp", "length") if there.any()}
    out |= {"pairs": 0.0, "nonfinite_responses": float((groups["finite"] == 0).sum())}
    if all(there.any() for there in sides.values()):
        good, bad = (groups[f"{side}_reward"][there] for side, there in sides.items())
        out |= {"logp_margin": out["chosen_logp"] - out["rejected_logp"],
                "reward_margin": float(good.mean() - bad.mean()), "reward_auc": auc(-good, -bad)}
    return out


def share_of(difference: np.ndarray) -> np.ndarray:
    """1 where positive, 0 where negative, a half at 0."""
    return (np.sign(np.nan_to_num(difference, nan=-1.0)) + 1) / 2


def interval(share: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval of a share of n draws."""
    center, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (center - spread) / (1 + z * z / n), (center + spread) / (1 + z * z / n)


def is_pairs(dataset: Any) -> bool:
    """Whether a data set holds pairs."""
    return getattr(dataset, "pairs", False)
