"""Terms: a loss and its weight, and the sum of many."""

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp

from lm.core.types import Array, Loss, Mean

Weight = float | Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of an objective: a loss per position, and a weight that is a number or a function of the step."""

    loss: Loss
    weight: Weight = 1.0


def weight_at(weight: Weight, step: Array) -> Array:
    """The value of a weight at this step, float32."""
    return jnp.asarray(weight(step) if callable(weight) else weight, jnp.float32)


def total(means: Mapping[str, Mean], weights: Mapping[str, Weight], step: Array) -> Array:
    """sum over terms of weight * total / count, float32 or wider."""
    return sum(weight_at(weights[name], step) * mean.value for name, mean in means.items())
