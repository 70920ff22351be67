"""`wkv4` where time is split over devices. B batch, T time of one device, C channels."""

import jax
import jax.numpy as jnp

from pallas_kernels.sequence import Element, exchange, reduced
from pallas_kernels.wkv4.api import initial_state, wkv4
from pallas_kernels.wkv4.reference import EMPTY

Array = jax.Array


def wkv4_over_sequence(w: Array, u: Array, k: Array, v: Array, state: Array | None = None,
                       reset: Array | None = None, *, axis_name: str,
                       implementation: str | tuple[str, ...] | None = None) -> tuple[Array, Array]:
    """`wkv4` inside `jax.shard_map`, T cut along mesh axis `axis_name` in order; w, u, state the same on its devices.

    y is this device's part; the state returned is the one after all of time, the same on all devices.
    """
    wide = jnp.promote_types(k.dtype, jnp.float32)
    state = initial_state(k.shape[0], k.shape[2], wide) if state is None else state.astype(wide)
    # Of a step: log decay, average, log weight. The past of a document that starts here weighs nothing.
    faded = jnp.broadcast_to(-w.astype(wide), k.shape)
    if reset is not None:
        faded = jnp.where(reset[..., None], EMPTY, faded)
    stretch = reduced((faded, v.astype(wide), k.astype(wide)), combine)
    initial = jnp.zeros_like(state[:, 0]), state[:, 0], state[:, 1]
    before, last = exchange(stretch, initial, combine, axis_name)
    y, _ = wkv4(w, u, k, v, jnp.stack(before[1:], axis=1), reset, implementation=implementation)
    return y, jnp.stack(last[1:], axis=1)


def combine(first: Element, second: Element) -> Element:
    """Elements (log decay, average of the values, log of their weight): the first has decayed when the second ends."""
    faded, mean, weight = first[0] + second[0], first[1], first[2] + second[0]
    top = jnp.maximum(weight, second[2])
    older, newer = jnp.exp(weight - top), jnp.exp(second[2] - top)
    return faded, (older * mean + newer * second[1]) / (older + newer), top + jnp.log(older + newer)
