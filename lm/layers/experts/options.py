"""What the layers of experts share about their fields and their running statistics."""

import jax.numpy as jnp
from flax import linen as nn

from lm.core.tree import STATS


def declare_usage(layer: nn.Module, num_experts: int) -> None:
    """The running statistic of `lm.core.tally.Usage`: steps since each expert was last chosen."""
    layer.variable(STATS, "usage", lambda: {"idle": nn.LogicallyPartitioned(jnp.zeros((num_experts,)), ("experts",))})


def check_counts(name: str, **counts: int | None) -> None:
    """Raises ValueError for a count below 1."""
    for field, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}.{field}={value} must be at least 1")


def check_momentum(name: str, momentum: float) -> None:
    """Raises ValueError for a momentum that is no share."""
    if not 0 <= momentum <= 1:
        raise ValueError(f"{name}.momentum={momentum} must be from 0 to 1, which freezes the statistics")
