"""Log-probabilities of a reference model, computed once and kept on disk: training then holds no second model.

R rows of the plan of the data, T positions. The plan's rows are the same in every epoch, so a table [R, T] serves all.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from lm.core.batch import Batch
from lm.core.types import Apply, Array, Params
from lm.losses.preference.reference import without_adapters
from lm.tasks.language_modeling import score_batch

log = logging.getLogger(__name__)

SHOWN = 5  # places that a message names


def write(path: epath.PathLike, apply: Apply, params: Params, dataset: Any, place: Callable[[Batch], Batch], *,
          on_nonfinite: str = "stop") -> np.ndarray:
    """The table of a data set of pairs under the model without its adapters, float32, also written to `path`.

    place: puts a batch on the devices. Where a log-probability is not finite the pair's lines are named; on_nonfinite=
    "stop" raises ValueError, "skip" leaves the NaN in the table, and its pairs out of every batch.
    """
    variables, table = without_adapters(params), np.zeros((dataset.num_rows_per_epoch, dataset.seq_len), np.float32)
    bad: list[str] = []
    for number, batch in enumerate(dataset.eval_batches()):
        first = number * dataset.batch_size
        found = np.asarray(jax.device_get(_logp(apply, variables, place(Batch(*batch[:5])))))[:len(table) - first]
        table[first:first + len(found)] = np.where(batch.weights[:len(found)] > 0, found, 0)
        for row in np.flatnonzero(~np.isfinite(table[first:first + len(found)]).all(axis=1)):
            groups = np.unique((batch.segment_ids[row][~np.isfinite(table[first + row])] - 1) // 3)
            places = dataset.row_places(first + row)
            bad += [places[group] for group in groups]
    if bad:
        what = (f"{len(bad)} pairs have log-probabilities under the reference that are not finite: "
                f"{', '.join(bad[:SHOWN])}{' and others' if len(bad) > SHOWN else ''}")
        if on_nonfinite == "stop":
            raise ValueError(f"{what}; mend the reference, or leave them out with train.on_nonfinite='skip'")
        log.warning("%s; they are left out", what)
    with epath.Path(path).open("wb") as file:
        np.save(file, table, allow_pickle=False)
    return table


def read(path: epath.PathLike, dataset: Any) -> np.ndarray:
    """The table that `write` made for this data set. Raises ValueError where it is absent or of another shape."""
    path = epath.Path(path)
    if not path.exists():
        raise ValueError(f"{path}, the reference log-probabilities of this run, is missing; start in a new workdir")
    with path.open("rb") as file:
        table = np.load(file, allow_pickle=False)
    if table.shape != (dataset.num_rows_per_epoch, dataset.seq_len):
        raise ValueError(f"{path} is of shape {table.shape}, the data have {dataset.num_rows_per_epoch} rows of "
                         f"{dataset.seq_len}; start in a new workdir")
    return table


@functools.partial(jax.jit, static_argnames=("apply",))
def _logp(apply: Apply, params: Params, batch: Batch) -> Array:
    return score_batch(apply, params, batch).logp
