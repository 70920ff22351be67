"""What recurrent depth draws at random: the number of iterations of a step, and the state that they begin from.

Geiping et al. 2025 (arXiv:2502.05171), sections 3.1 and 3.3. B batch, T time, D width.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.types import Array, Key

STATE_STD = math.sqrt(2 / 5)
BOUND = 3.0  # states are cut off at so many deviations
# A normal cut off at 3 / WIDER, times WIDER, has deviation 1 and no value beyond 3.
WIDER = 1.015387
TAIL = 1e-9


@functools.cache
def iteration_pmf(mean: float, sigma: float) -> np.ndarray:
    """[N] float64, probability of 1, 2, ... N iterations: 1 + Poisson(exp(tau)), tau normal with deviation sigma around
    log(mean) - sigma^2 / 2, so that the rate is `mean` on average. N leaves out less than TAIL. mean = 0 is always 1.

    By summing the Poisson distribution over a fine grid of tau.
    """
    if mean == 0:
        return np.ones(1)
    z = np.linspace(-8, 8, 1601)
    weight = np.exp(-z * z / 2)
    log_rate = math.log(mean) - sigma * sigma / 2 + sigma * z[:, None]
    most = float(np.exp(log_rate[-200, 0]))  # at six deviations
    counts = np.arange(int(most + 8 * math.sqrt(most) + 20))
    factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, len(counts))))])
    pmf = (weight[:, None] * np.exp(counts * log_rate - np.exp(log_rate) - factorial)).sum(0) / weight.sum()
    kept = int(np.searchsorted(np.cumsum(pmf), 1 - TAIL)) + 1
    return pmf[:kept] / pmf[:kept].sum()


def draw_iterations(key: Key, mean: float, sigma: float) -> Array:
    """[] int32, distributed as `iteration_pmf`: the place of one uniform number among the sums of it.

    A key of any kind will do (`jax.random.poisson` takes threefry alone), and all devices, which share the key, get the
    same number: the loop that it bounds holds collectives.
    """
    sums = np.cumsum(iteration_pmf(mean, sigma))[:-1].astype(np.float32)
    place = jnp.searchsorted(jnp.asarray(sums), jax.random.uniform(key), side="right")
    return 1 + place.astype(jnp.int32)


def mean_iterations(mean: float, sigma: float, at_most: int | None = None) -> float:
    """Expected iterations, or of min(iterations, at_most)."""
    pmf = iteration_pmf(mean, sigma)
    count = np.arange(1, len(pmf) + 1)
    return float(pmf @ (count if at_most is None else np.minimum(count, at_most)))


def random_state(key: Key, positions: Array, width: int, std: float, dtype: Any, *, by_row: bool) -> Array:
    """[B, T, D] normal with deviation `std`, cut off at 3 of them: a function of the key, the position [B, T] of a
    token in its document and, where by_row, of the row. So one token at a time gets what the whole sequence would."""
    rows = jnp.arange(positions.shape[0])
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows) if by_row else jnp.broadcast_to(key, rows.shape)
    bound = BOUND / WIDER
    one = lambda key, position: jax.random.truncated_normal(jax.random.fold_in(key, position), -bound, bound, (width,))
    drawn = jax.vmap(lambda key, row: jax.vmap(lambda position: one(key, position))(row))(keys, positions)
    return (WIDER * std * drawn).astype(dtype)
