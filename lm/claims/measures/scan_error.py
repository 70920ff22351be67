"""Rounding error of the two ways to scan minGRU in float32: h_t = a_t h_{t-1} + b_t itself, and its logarithms.

The log-space form is Heinsen's (2023), as the papers of minGRU use it: log h_t = A_t + logcumsumexp(log b_t - A_t) with
A_t the running sum of log a_t. B batch, T time, C channels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_scan import min_gru


def inputs(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Pre-activations of candidate and gate, standard normal, float32."""
    draw = np.random.default_rng(seed)
    return draw.standard_normal(shape).astype(np.float32), draw.standard_normal(shape).astype(np.float32)


def exact(hidden: np.ndarray, gate: np.ndarray) -> np.ndarray:
    """The recurrence in float64, one step after the other, from h = 0."""
    hidden, gate = hidden.astype(np.float64), gate.astype(np.float64)
    z = 1 / (1 + np.exp(-gate))
    candidate = np.where(hidden >= 0, hidden + 0.5, 1 / (1 + np.exp(-hidden)))
    h, out = np.zeros_like(hidden[:, 0]), np.empty_like(hidden)
    for t in range(hidden.shape[1]):
        h = (1 - z[:, t]) * h + z[:, t] * candidate[:, t]
        out[:, t] = h
    return out


def log_space(hidden: jax.Array, gate: jax.Array) -> jax.Array:
    """Heinsen's scan: float32 throughout, h_0 = 0."""
    log_a, log_z = -jax.nn.softplus(gate), -jax.nn.softplus(-gate)
    log_candidate = jnp.where(hidden >= 0, jnp.log(jnp.maximum(hidden, 0) + 0.5), -jax.nn.softplus(-hidden))
    total = jnp.cumsum(log_a, axis=1)
    return jnp.exp(total + jax.lax.cumlogsumexp(log_z + log_candidate - total, axis=1))


def direct(hidden: jax.Array, gate: jax.Array, implementation: str | None) -> jax.Array:
    """The layer's own scan."""
    start = jnp.zeros((hidden.shape[0], hidden.shape[2]), jnp.float32)
    return min_gru(hidden, gate, start, activation="g", implementation=implementation)[0]


def largest_error(config: Any, scan: Callable[[jax.Array, jax.Array], jax.Array]) -> dict[str, float]:
    """`error`: largest |h - exact| / |exact| over all positions and channels. The sizes are those of
    `train.batch_size`, `train.seq_len` and `model.min_gru.hidden_dim`; inputs are drawn by `train.seed`."""
    shape = (config.train.batch_size, config.train.seq_len, config.model.min_gru.hidden_dim)
    hidden, gate = inputs(config.train.seed, shape)
    right, found = exact(hidden, gate), np.asarray(jax.jit(scan)(hidden, gate), np.float64)
    return {"error": float(np.max(np.abs(found - right) / np.abs(right)))}


def scan_error(config: Any) -> dict[str, float]:
    """`largest_error` of the layer's scan, by `model.min_gru.implementation`."""
    return largest_error(config, lambda hidden, gate: direct(hidden, gate, config.model.min_gru.implementation))


def log_scan_error(config: Any) -> dict[str, float]:
    """`largest_error` of the log-space scan."""
    return largest_error(config, log_space)
