"""Loss, perplexity, bits per byte and accuracy on named sets, summed exactly over all their targets.

Shape legend: B batch rows, T time.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.batch import Batch
from lm.core.recurrences import STEPS
from lm.core.sharding import constrain
from lm.core.types import Apply, Array, Key, Mean, Params
from lm.eval.sets import EvalSet
from lm.losses.cross_entropy import token_scores


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Evaluator of every set: `eval/<set>/loss` (nats a token), `perplexity` (its exponential), `accuracy` (share of
    targets that are the most probable token), where tokens stop by themselves `steps` (iterations a target) and, where
    the set knows the bytes of its tokens, `bits_per_byte`.

    place: puts a batch on the devices, as the train step's input is; None leaves it to `jit`, which splits the rows
      over the current mesh. chunk: positions of a row whose logits exist at a time; None picks by memory.

    Raises ValueError for a set without targets.
    """

    sets: Mapping[str, EvalSet]
    place: Callable[[Batch], Batch] | None = None
    chunk: int | None = None

    def __call__(self, apply: Apply, params: Params, key: Key | None = None) -> Iterator[tuple[str, float]]:
        for name, given in self.sets.items():
            totals = self._totals(apply, params, given)
            if not totals or totals["loss"].count == 0:
                raise ValueError(f"evaluation set {name!r} has no target to score; give it text of at least two tokens")
            for metric, value in metrics_of(totals).items():
                yield f"eval/{name}/{metric}", value

    def _totals(self, apply: Apply, params: Params, given: EvalSet) -> dict[str, Mean]:
        """Sums over the set, in float64 on the host."""
        sizes = None if given.token_bytes is None else np.asarray(given.token_bytes, np.float32)
        totals: dict[str, Mean] = {}
        waiting = None
        for batch in given.batches():
            now = batch_totals(apply, params, batch if self.place is None else self.place(batch), sizes, self.chunk)
            # One batch behind: the device computes while the next batch is made, and no queue builds up.
            totals, waiting = add(totals, waiting), now
        return add(totals, waiting)


@functools.partial(jax.jit, static_argnames=("apply", "chunk"))
def batch_totals(apply: Apply, params: Params, batch: Batch, sizes: Array | None,
                 chunk: int | None) -> dict[str, Mean]:
    """Sums over one batch [B, T]: loss in nats, right answers and, with `sizes` [vocab], bytes of the targets."""
    batch = Batch(*(constrain(field, "batch", "length") for field in batch))
    out = apply(params, batch.tokens, reset=batch.reset, positions=batch.positions, weights=batch.present)
    scores = token_scores(out.hidden, out.head, batch.targets, chunk=chunk)
    steps = out.aux.get(STEPS)  # [1, B, T]
    totals = {"loss": Mean.of(-scores.logp, batch.weights),
              "accuracy": Mean.of(scores.argmax == batch.targets, batch.weights)}
    if steps is not None:
        totals["steps"] = Mean.of(steps[0], batch.weights)
    if sizes is not None:
        # Targets of weight 0 may be anything, so they are clipped.
        totals["bytes"] = Mean.of(jnp.take(sizes, batch.targets, mode="clip"), batch.weights)
    return jax.tree.map(constrain, totals)


def add(totals: Mapping[str, Mean], new: Mapping[str, Mean] | None) -> dict[str, Mean]:
    """The sum of both as Python floats; `totals` may be empty and `new` None."""
    if new is None:
        return dict(totals)
    zero = Mean(0.0, 0.0)
    return {name: Mean(totals.get(name, zero).total + float(total), totals.get(name, zero).count + float(count))
            for name, (total, count) in jax.device_get(dict(new)).items()}


def metrics_of(totals: Mapping[str, Mean]) -> dict[str, float]:
    """Metrics from the sums of `batch_totals`. Bits per byte is total nats / ln 2 / total bytes, which does not depend
    on the tokenizer."""
    loss = totals["loss"].total / totals["loss"].count
    out = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan}
    if "bytes" in totals and totals["bytes"].total > 0:
        out["bits_per_byte"] = totals["loss"].total / math.log(2) / totals["bytes"].total
    out["accuracy"] = totals["accuracy"].total / totals["accuracy"].count
    if "steps" in totals:
        out["steps"] = totals["steps"].total / totals["steps"].count
    return out
