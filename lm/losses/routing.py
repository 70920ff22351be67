"""Losses that layers report beside their output: balance and scale of a router.

A router's layer returns one number for the tokens of a call in `Output.aux`, under `<layer>/<name>`, [L] with one entry
a layer. The loss is their mean over layers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lm.core.batch import Batch
from lm.core.types import Array, Mean


@dataclasses.dataclass(frozen=True)
class Reported:
    """name: of what layers report. additive: whether a batch's value is the mean over its tokens of something that
    each token has alone, so that microbatches add up."""

    name: str
    additive: bool

    def mean(self, aux: Mapping[str, Any], batch: Batch) -> Mean:
        """The mean over the layers that report it, weighted by the batch's tokens that are no padding.

        Raises ValueError where no layer does.
        """
        found = [value for name, value in aux.items() if name.split("/")[-1] == self.name]
        if not found:
            raise ValueError(f"config.loss.{self.name} is reported by no layer of this model; use a layer whose "
                             f"router has it (moe), or leave the loss out")
        count = self.count(batch)
        return Mean(jnp.mean(jnp.concatenate(found)) * count, count)

    def count(self, batch: Batch) -> Array:
        """Tokens that are no padding."""
        return jnp.sum(batch.present, dtype=jnp.float32)
