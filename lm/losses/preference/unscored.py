"""Groups that cannot be compared, because a log-probability of theirs is not finite: found, and taken out of a batch.

A loss alone cannot leave them out: where a hidden state is not finite either, its product with a cotangent of 0 is NaN,
and so is the gradient of every kernel. So they leave the batch, as padding that no document sees.

Shape legend: B rows, T time, G groups of a row (T of them, as in `lm.losses.preference.responses`).
"""

from typing import Any

import jax.numpy as jnp

from lm.core.types import Array
from lm.losses.preference.responses import KINDS, Groups, sums


def unscored(groups: Groups, taught: Array | None = None, logp: Array | None = None,
             segment_ids: Array | None = None) -> Array:
    """[B, G] bool: groups of which a response that is there has a log-probability that is not finite, under the model
    or under the reference. taught, logp, segment_ids: [B, T], where given a position that teaches by itself counts."""
    found = jnp.zeros(groups.paired.shape, bool)
    for side in groups:  # of one that is not there the sums are 0
        found |= ~jnp.isfinite(side.logp)
        if side.reference is not None:
            found |= ~jnp.isfinite(side.reference)
    if taught is not None:
        found |= (sums(((taught > 0) & ~jnp.isfinite(logp)).astype(jnp.float32), segment_ids) > 0).any(-1)
    return found


def positions_of(marked: Array, segment_ids: Array) -> Array:
    """[B, T] bool: the positions of the groups that are marked, [B, G]."""
    inside = segment_ids > 0
    return inside & jnp.take_along_axis(marked, jnp.where(inside, (segment_ids - 1) // KINDS, 0), axis=1)


def without(batch: Any, marked: Array) -> Any:
    """The batch with the groups that are marked, [B, G], as padding: nothing is predicted there, and their documents
    still end where they ended."""
    gone = positions_of(marked, batch.segment_ids)
    none = lambda field: jnp.where(gone, jnp.zeros((), field.dtype), field)
    return batch._replace(tokens=none(batch.tokens), targets=none(batch.targets), weights=none(batch.weights),
                          segment_ids=none(batch.segment_ids))
