"""Dropout whose key is an argument: the same mask under scan, remat and the unrolled stack."""

import jax
import jax.numpy as jnp

from lm.core.types import Array, Key


def dropout(x: Array, rate: float, key: Key | None, salt: int = 0) -> Array:
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate); identity without a key.

    `salt` tells apart two dropouts of one layer.
    """
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(jax.random.fold_in(key, salt), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
