"""Back to the last good checkpoint after too many updates in a row that could not be taken.

The parameters, the optimizer and what the guard has seen are those of the checkpoint; the step counter goes on from
here, and with it the data and the random numbers: the batches that led here are not seen again (PaLM, Chowdhery et al.
2022, section 5.1). The updates that are lost count as skipped, so that the schedule fits the optimizer.
"""

from collections.abc import Mapping

import jax
import numpy as np
from absl import logging

from lm.train.checkpoint import Checkpoints
from lm.train.state import TrainState


def roll_back(checkpoints: Checkpoints, abstract: TrainState, row: Mapping[str, float], step: int,
              most: int) -> TrainState | None:
    """The state to go on with after `step` steps whose metrics are `row`; None where the run has to end instead: there
    was no checkpoint before the first of these updates, or it went back `most` times already.

    Where nothing was saved since the last time, it goes back further.
    """
    checkpoints.wait()
    last = int(row["train/back_to"])
    good = [at for at in checkpoints.steps if at <= step - int(row["train/skips"])]
    if good and good[-1] <= last:
        good = [at for at in good if at < last]
    if not good or row["train/rollbacks"] >= most:
        why = f"it went back {most} times already (train.max_rollbacks)" if good else "no checkpoint is from before"
        logging.error("step %d: %d updates in a row were left out, and %s", step, int(row["train/skips"]), why)
        return None
    back, _ = checkpoints.restore(abstract, good[-1])
    logging.warning("step %d: %d updates in a row were left out. Went back to the parameters of step %d; the data go "
                    "on from step %d", step, int(row["train/skips"]), good[-1], step)
    updates = int(jax.device_get(back.step)) - int(jax.device_get(back.skipped))
    put = lambda value, like: jax.device_put(np.asarray(value, like.dtype), like.sharding)
    guard = back.guard._replace(spikes=put(row["train/spikes"], back.guard.spikes),
                                rollbacks=put(row["train/rollbacks"] + 1, back.guard.rollbacks),
                                back_to=put(good[-1], back.guard.back_to))
    return back._replace(step=put(step, back.step), skips=put(0, back.skips), skipped=put(step - updates, back.skipped),
                         guard=guard)
