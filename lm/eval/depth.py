"""Evaluation of a model of recurrent depth: at other numbers of iterations, and how many each set's tokens take.

B batch rows, T time.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from lm.core.batch import Batch
from lm.core.recurrences import STEPS, with_recurrences
from lm.core.types import Apply, Array, Key, Params
from lm.eval.base import Evaluator
from lm.eval.sets import EvalSet


@dataclasses.dataclass(frozen=True)
class AtDepth:
    """The evaluators at other depths: `eval/<set>_<name>/<metric>`. settings: name to (iterations, threshold), either
    None for the model's own. One program serves all numbers of iterations, and one all thresholds: they are data."""

    evaluators: Sequence[Evaluator]
    settings: Mapping[str, tuple[int | None, float | None]]

    def __call__(self, apply: Apply, params: Params, key: Key | None = None) -> Iterator[tuple[str, float]]:
        for setting, (recurrences, exit_kl) in self.settings.items():
            for evaluator in self.evaluators:
                for name, value in evaluator(apply, with_recurrences(params, recurrences, exit_kl), key):
                    head, given, metric = name.split("/")
                    yield f"{head}/{given}_{setting}/{metric}", value


def at_recurrences(counts: Sequence[int]) -> dict[str, tuple[int | None, float | None]]:
    """Settings named r<number>."""
    return {f"r{count}": (count, None) for count in counts}


@dataclasses.dataclass(frozen=True)
class StepsHistogram:
    """How many targets of each set stopped after n iterations: `eval/<set>/steps_<n>`, their share, for each n that
    occurs. The variables must hold a threshold (`exit_kl`), or the model's options.

    place: as in `lm.eval.perplexity.Perplexity`. Raises ValueError where tokens do not stop by themselves.
    """

    sets: Mapping[str, EvalSet]
    place: Callable[[Batch], Batch] | None = None

    def __call__(self, apply: Apply, params: Params, key: Key | None = None) -> Iterator[tuple[str, float]]:
        for name, given in self.sets.items():
            counts: dict[int, float] = {}
            for batch in given.batches():
                steps = batch_steps(apply, params, batch if self.place is None else self.place(batch))
                if steps is None:
                    raise ValueError("tokens of this model take all iterations; give a threshold to stop at "
                                     "(--exit-kl, model.recurrent_depth.exit_kl)")
                values, found = np.unique(np.asarray(steps)[np.asarray(batch.weights) != 0], return_counts=True)
                for value, count in zip(values.tolist(), found.tolist(), strict=True):
                    counts[value] = counts.get(value, 0) + count
            total = sum(counts.values())
            for value in sorted(counts):
                yield f"eval/{name}/steps_{value}", counts[value] / total


@functools.partial(jax.jit, static_argnames=("apply",))
def batch_steps(apply: Apply, params: Params, batch: Batch) -> Array | None:
    """[B, T] iterations of each token; None where tokens do not stop by themselves."""
    out = apply(params, batch.tokens, reset=batch.reset, positions=batch.positions, weights=batch.present)
    return out.aux[STEPS][0] if STEPS in out.aux else None


def histograms(metrics: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """The shares among the metrics of a `StepsHistogram`: {set: {iterations: share}}."""
    out: dict[str, dict[int, float]] = {}
    for name, value in metrics.items():
        _, given, metric = name.split("/")
        if metric.startswith("steps_"):
            out.setdefault(given, {})[int(metric.removeprefix("steps_"))] = value
    return out
