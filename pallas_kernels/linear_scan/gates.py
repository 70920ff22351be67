"""From pre-activations to the a and b of h_t = a_t h_{t-1} + b_t, elementwise: minGRU and minLSTM (arXiv 2410.01201).

a is in [0, 1], so that the scan cannot overflow. All forms here take exponentials of numbers that are not positive, and
share them: a gate and its complement come from one, each exact to its last digits. `reference.py` has the formulas.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Gates(NamedTuple):
    """A kind of unit, "min_gru" or "min_lstm", with one of `ACTIVATIONS`: strings, so that it can be hashed."""
    unit: str
    activation: str

    def __call__(self, hidden: Array, *gates: Array) -> tuple[Array, Array]:
        """(a, b) from pre-activations of one shape."""
        keep, take = _UNITS[self.unit].weights(*gates)
        return keep, take * ACTIVATIONS[self.activation].value(hidden)

    def decay(self, hidden: Array, *gates: Array) -> Array:
        """a alone."""
        return _UNITS[self.unit].weights(*gates)[0]

    def pull(self, inputs: tuple[Array, ...], da: Array, db: Array) -> tuple[Array, ...]:
        """Gradients of the pre-activations from those of a and b. Both weights add to 1, so d(take) = -d(keep)."""
        hidden, *gates = inputs
        unit, activation = _UNITS[self.unit], ACTIVATIONS[self.activation]
        keep, take = unit.weights(*gates)
        value, slope = activation.value_and_slope(hidden)
        return db * take * slope, *unit.pull((db * value - da) * keep * take, *gates)


def _sigmoids(x: Array) -> tuple[Array, Array]:
    """sigmoid(x) and sigmoid(-x)."""
    small = jnp.exp(-jnp.abs(x))
    large = 1 / (1 + small)
    small = small * large
    return jnp.where(x >= 0, large, small), jnp.where(x >= 0, small, large)


class _Activation(NamedTuple):
    value: Callable[[Array], Array]
    value_and_slope: Callable[[Array], tuple[Array, Array]]


def _positive(x: Array) -> Array:
    below = jnp.exp(jnp.minimum(x, 0))
    return jnp.where(x >= 0, x + 0.5, below / (1 + below))


def _positive_and_slope(x: Array) -> tuple[Array, Array]:
    below = jnp.exp(jnp.minimum(x, 0))
    complement = 1 / (1 + below)
    below = below * complement
    return jnp.where(x >= 0, x + 0.5, below), jnp.where(x >= 0, 1, below * complement)


def _tanh_and_slope(x: Array) -> tuple[Array, Array]:
    value = jnp.tanh(x)
    return value, 1 - value * value


ACTIVATIONS = {
    "g": _Activation(_positive, _positive_and_slope),
    "identity": _Activation(lambda x: x, lambda x: (x, jnp.ones_like(x))),
    "tanh": _Activation(jnp.tanh, _tanh_and_slope),
}


class _Unit(NamedTuple):
    """weights: (keep, take). pull: gradients of the gates from that of log(take / keep)."""
    weights: Callable[..., tuple[Array, Array]]
    pull: Callable[..., tuple[Array, ...]]


def _min_gru(gate: Array) -> tuple[Array, Array]:
    take, keep = _sigmoids(gate)
    return keep, take


def _min_lstm(forget: Array, take: Array) -> tuple[Array, Array]:
    """f / (f + i) = (1 + exp(-take)) / (2 + exp(-take) + exp(-forget)), everything times exp of the least exponent."""
    least = jnp.minimum(jnp.minimum(forget, take), 0)
    one = jnp.exp(least)
    keep, taken = one + jnp.exp(least - take), one + jnp.exp(least - forget)
    whole = 1 / (keep + taken)
    return keep * whole, taken * whole


def _pull_min_lstm(ratio: Array, forget: Array, take: Array) -> tuple[Array, Array]:
    """d log i = sigmoid(-take), d log f = sigmoid(-forget)."""
    return -ratio * _sigmoids(forget)[1], ratio * _sigmoids(take)[1]


_UNITS = {"min_gru": _Unit(_min_gru, lambda ratio, gate: (ratio,)), "min_lstm": _Unit(_min_lstm, _pull_min_lstm)}
