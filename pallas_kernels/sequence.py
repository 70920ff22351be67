"""A recurrence over a sequence that is split over devices: inside `jax.shard_map`, with time cut along one mesh axis.

What a stretch of time does to the state before it is an element of a monoid: `combine(first, second)` is what the one
and then the other do. Each device finds the element of its stretch, the prefixes are exchanged in log2(n) rounds of
neighbours at distance 1, 2, 4, ..., and each device then runs its stretch from the state that it starts with.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
Element = tuple[Array, ...]
Combine = Callable[[Element, Element], Element]


def exchange(stretch: Element, initial: Element, combine: Combine, axis_name: str) -> tuple[Element, Element]:
    """(state before this device's stretch, state after the last one's), the latter the same on every device.

    stretch: what this device's part of time does, arrays of any shape and one dtype. initial: the state before all of
    time as an element, the same on every device: one whose own past does not matter.
    """
    devices, index = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    here = _where(index == 0, combine(initial, stretch), stretch)
    distance = 1
    while distance < devices:
        # Devices that have nobody at this distance get zeros, and keep what they have.
        here = _where(index >= distance, combine(_moved(here, distance, devices, axis_name), here), here)
        distance *= 2
    before = _where(index == 0, initial, _moved(here, 1, devices, axis_name))
    of_last = jnp.where(index == devices - 1, _packed(here), 0)
    return before, _unpacked(jax.lax.psum(of_last, axis_name), here)


def reduced(steps: Element, combine: Combine) -> Element:
    """The element of all steps together: arrays [B, T, ...] with one element a step become [B, ...], in log2(T) rounds.

    Differentiable; each round is computed again for the gradient.
    """
    pairs = jax.checkpoint(lambda steps: combine(tuple(x[:, ::2] for x in steps), tuple(x[:, 1::2] for x in steps)))
    while (length := steps[0].shape[1]) > 1:
        even = pairs(tuple(x[:, :length // 2 * 2] for x in steps))
        steps = tuple(jnp.concatenate([x, y[:, -1:]], axis=1) if length % 2 else x
                      for x, y in zip(even, steps, strict=True))
    return tuple(x[:, 0] for x in steps)


def affine(first: Element, second: Element) -> Element:
    """Elements (a, b) of h -> a h + b, elementwise. A state h is (anything, h)."""
    return second[0] * first[0], second[0] * first[1] + second[1]


def _moved(element: Element, distance: int, devices: int, axis_name: str) -> Element:
    pairs = [(source, source + distance) for source in range(devices - distance)]
    return _unpacked(jax.lax.ppermute(_packed(element), axis_name, pairs), element)


def _packed(element: Element) -> Array:
    """All arrays in one message: a round costs one latency. They have one dtype."""
    return jnp.concatenate([x.ravel() for x in element])


def _unpacked(message: Array, like: Element) -> Element:
    ends = list(itertools.accumulate(x.size for x in like))
    return tuple(part.reshape(x.shape) for part, x in zip(jnp.split(message, ends[:-1]), like, strict=True))


def _where(condition: Array, yes: Element, no: Element) -> Element:
    return tuple(jnp.where(condition, x, y) for x, y in zip(yes, no, strict=True))
