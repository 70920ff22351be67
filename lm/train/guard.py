"""Tells a spike from an ordinary step, inside the compiled train step.

An update is a spike where its loss or the norm of its gradient is above the mean of the newest W updates that were
taken by more than `sigma` of their standard deviations, as in OLMo's SkipStepOptimizer (OLMo et al. 2024, "2 OLMo 2
Furious", arXiv:2501.00656). What was left out does not enter the mean, so one spike does not let the next one through.
"""

from typing import NamedTuple

import jax.numpy as jnp

from lm.core.types import Array


class Guard(NamedTuple):
    """seen: float32 [2, W], loss and gradient norm of the newest W updates that were taken, the n-th at n % W. taken:
    int32, how many were taken while the guard was on. spikes: how many were left out as spikes. rollbacks: how often
    the run went back to a checkpoint. back_to: step of the newest of these checkpoints, -1 for none."""

    seen: Array
    taken: Array
    spikes: Array
    rollbacks: Array
    back_to: Array


def fresh_guard(window: int) -> Guard:
    """Nothing seen yet."""
    zero = jnp.zeros((), jnp.int32)
    return Guard(jnp.zeros((2, window), jnp.float32), zero, zero, zero, zero - 1)


def is_spike(guard: Guard, values: Array, sigma: float) -> Array:
    """Whether one of `values` [2] (loss, gradient norm) is a spike; never before half of the window is full."""
    window = guard.seen.shape[1]
    known = jnp.arange(window) < guard.taken
    count = jnp.clip(guard.taken, 1, window)
    mean = jnp.where(known, guard.seen, 0).sum(1) / count
    variance = jnp.where(known, jnp.square(guard.seen - mean[:, None]), 0).sum(1) / count
    return (guard.taken >= (window + 1) // 2) & jnp.any(values > mean + sigma * jnp.sqrt(variance))


def noted(guard: Guard, values: Array, taken: Array, spike: Array) -> Guard:
    """The guard after a step; taken: whether its update was."""
    place = guard.taken % guard.seen.shape[1]
    return guard._replace(seen=jnp.where(taken, guard.seen.at[:, place].set(values), guard.seen),
                          taken=guard.taken + taken, spikes=guard.spikes + spike)
