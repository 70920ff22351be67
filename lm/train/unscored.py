"""Groups of rows whose scores are not finite: left out inside of the compiled step, and told by the host.

An objective that compares responses marks them in its metrics, under UNSCORED: bool [B, G], G groups of a row. One that
can do without them also has `without(batch, marked)`, and hands on its carry as it is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.batch import Batch
from lm.core.types import UNSCORED, Array, Carry

COUNT = "train/nonfinite_pairs"  # metric: groups of the batch that are marked
Tell = Callable[[int, list[tuple[int, int]]], None]


def leaving_out(run: Callable[[Batch], Any], without: Callable[[Batch, Array], Batch], batch: Batch,
                carry: Carry) -> tuple[Any, Array]:
    """(`run(batch)`, what it marks), and where it marks anything (`run` of the batch without that, what was marked at
    first); not where nothing to be predicted would remain.

    run: gives what `lm.train.step.accumulate` does, `carry` as it is. It is one program that runs once or twice, so
    that an ordinary step costs nothing and nothing is compiled twice.
    """
    def apart(batch: Batch) -> Any:  # from the carry, which is not to be copied around the loop
        loss, grads, (means, _, metrics) = run(batch)
        return loss, grads, means, metrics

    marks = lambda result: result[3][UNSCORED]
    shapes = jax.eval_shape(apart, batch)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def again(loop):
        number, marked, _ = loop
        return (number == 0) | ((number == 1) & marked.any() & (without(batch, marked).weights > 0).any())

    def body(loop):
        number, marked, _ = loop
        result = apart(without(batch, marked))
        return number + 1, jnp.where(number == 0, marks(result), marked), result

    _, marked, (loss, grads, means, metrics) = jax.lax.while_loop(again, body, (jnp.int32(0), marks(nothing), nothing))
    return (loss, grads, (means, carry, metrics)), marked


def marked_here(marked: jax.Array) -> list[tuple[int, int]]:
    """(row of the global batch, group) of all that is marked in the rows of this process; of copies on several devices
    or processes only the first tells."""
    found = []
    for shard in marked.addressable_shards:
        if shard.replica_id == 0:
            first = shard.index[0].indices(marked.shape[0])[0]
            found += [(first + int(row), int(group)) for row, group in np.argwhere(np.asarray(shard.data))]
    return sorted(found)


class Unscored:
    """Takes the marks of every step out of its metrics, and tells of them when the step has finished. tell: called with
    the step (from 1) and what `marked_here` found, where anything was."""

    def __init__(self, tell: Tell | None):
        self._tell, self._waiting = tell, {}

    def took(self, step: int, metrics: dict[str, Any]) -> None:
        """Step `step` was dispatched."""
        marked = metrics.pop(UNSCORED, None)
        if marked is not None and self._tell is not None:
            self._waiting[step] = metrics[COUNT], marked

    def finished(self, step: int) -> None:
        """All steps up to `step` have finished, or are waited for now."""
        for number in [number for number in self._waiting if number <= step]:
            count, marked = self._waiting.pop(number)
            if float(count) and (here := marked_here(marked)):
                self._tell(number, here)
