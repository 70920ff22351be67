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
from lm.data.preference.places import first_of
from lm.losses.preference.reference import without_adapters
from lm.tasks.language_modeling import score_batch

log = logging.getLogger(__name__)


def write(path: epath.PathLike, apply: Apply, params: Params, dataset: Any, place: Callable[[Batch], Batch], *,
          on_nonfinite: str = "stop") -> np.ndarray:
    """The table of a data set of pairs under the model without its adapters, float32, also written to `path`.

    place: puts a batch on the devices. Where a log-probability is not finite the pair's lines are named; on_nonfinite=
    "stop" raises ValueError, "skip" leaves the NaN in the table, and its pairs out of every batch.
    """
    variables, table = without_adapters(params), np.zeros((dataset.num_rows_per_epoch, dataset.seq_len), np.float32)
    for number, batch in enumerate(dataset.eval_batches()):
        first = number * dataset.batch_size
        found = np.asarray(jax.device_get(_logp(apply, variables, place(Batch(*batch[:5])))))[:len(table) - first]
        table[first:first + len(found)] = np.where(batch.weights[:len(found)] > 0, found, 0)
    check(table, dataset, on_nonfinite)
    with epath.Path(path).open("wb") as file:
        np.save(file, table, allow_pickle=False)
    return table


def read(path: epath.PathLike, dataset: Any, *, on_nonfinite: str = "stop") -> np.ndarray:
    """The table that `write` made for this data set. Raises ValueError where it is absent or of another shape, and as
    `write` does where numbers in it are not finite."""
    path = epath.Path(path)
    if not path.exists():
        raise ValueError(f"{path}, the reference log-probabilities of this run, is missing; start in a new workdir")
    with path.open("rb") as file:
        table = np.load(file, allow_pickle=False)
    if table.shape != (dataset.num_rows_per_epoch, dataset.seq_len):
        raise ValueError(f"{path} is of shape {table.shape}, the data have {dataset.num_rows_per_epoch} rows of "
                         f"{dataset.seq_len}; start in a new workdir")
    check(table, dataset, on_nonfinite)
    return table


def check(table: np.ndarray, dataset: Any, on_nonfinite: str) -> None:
    """Names the lines of the pairs with log-probabilities in the table that are not finite: a ValueError with "stop", a
    warning with "skip"."""
    bad = []
    for row in np.flatnonzero(~np.isfinite(table).all(axis=1)):
        inside = dataset.reader.inside(row)
        places = dataset.row_places(row)
        bad += [places[group] for group in np.unique(inside[~np.isfinite(table[row])]) if group >= 0]
    if not bad:
        return
    what = (f"{len(bad)} of the pairs have log-probabilities under the reference that are not finite: {first_of(bad)}")
    if on_nonfinite == "stop":
        raise ValueError(f"{what}; mend the reference, or leave them out with train.on_nonfinite='skip'")
    log.warning("%s; they are left out", what)


@functools.partial(jax.jit, static_argnames=("apply",))
def _logp(apply: Apply, params: Params, batch: Batch) -> Array:
    return score_batch(apply, params, batch).logp
