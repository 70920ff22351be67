"""One step of wkv4 and of its backward, on the channels that a GPU program has in registers: README.md derives them.

A state is (a, b, p): average times b, weight over e^p, and the scale p. All rows are float32.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.wkv4.reference import EMPTY

Array = jax.Array
State = tuple[Array, Array, Array]


def open_state(mean: Array, log_weight: Array) -> State:
    """From what is handed on: b = 1."""
    return mean, jnp.ones_like(mean), log_weight


def close_state(state: State) -> tuple[Array, Array]:
    """(average, log weight)."""
    a, b, p = state
    return a / b, p + jnp.log(b)


def forgotten(state: State, forget: Callable) -> State:
    """The state, or that of no past where `forget` says so."""
    a, b, p = state
    return forget(a, 0.0), forget(b, 1.0), forget(p, EMPTY)


def output(u: Array, k: Array, v: Array, state: State) -> Array:
    """y of the step before which the state is."""
    a, b, p = state
    past, now = _weights(p, u + k)
    return (past * a + now * v) / (past * b + now)


def absorb(w: Array, k: Array, v: Array, state: State) -> State:
    """The state after the step."""
    a, b, p = state
    older, newer = _weights(p - w, k)
    return older * a + newer * v, older * b + newer, jnp.maximum(p - w, k)


def sweep(w: Array, u: Array, k: Array, v: Array, dy: Array, state: State,
          adjoint: Sequence[Array]) -> tuple[Array, Array, Sequence[Array]]:
    """(dk, dv, adjoint) of one step; adjoint: cotangents (da, db) of the state after it, and the sums (dw, du)."""
    a, b, p = state
    da, db, dw, du = adjoint
    past, now = _weights(p, u + k)
    slope = 1 / (past * b + now)
    y = (past * a + now * v) * slope
    slope = dy * slope                                                  # dy / d(numerator)
    older, newer = _weights(p - w, k)
    bonus = now * slope * (v - y)
    dk, dv = bonus + newer * (da * v + db), now * slope + newer * da
    faded = older * (da * a + db * b)
    return dk, dv, (older * da + past * slope, older * db - past * slope * y, dw - faded, du + bonus)


def _weights(x: Array, y: Array) -> tuple[Array, Array]:
    """e^x and e^y over the larger of them: one of the two is 1, so one exponential does."""
    smaller = jnp.exp(-jnp.abs(x - y))
    first = x >= y
    return jnp.where(first, 1.0, smaller), jnp.where(first, smaller, 1.0)
