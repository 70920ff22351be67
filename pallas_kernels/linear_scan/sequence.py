"""The scans of this folder where time is split over devices. B batch, T time of one device, C channels.

Inside `jax.shard_map`, with T cut along `axis_name` in order and h0 the same on all its devices: the arguments and
results of `linear_scan`, `min_gru` and `min_lstm`; h_last is the state after all of time, the same on all devices.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.linear_scan.api import linear_scan
from pallas_kernels.linear_scan.gated import min_gru, min_lstm
from pallas_kernels.linear_scan.gates import Gates
from pallas_kernels.sequence import affine, exchange, reduced

Array = jax.Array


def linear_scan_over_sequence(a: Array, b: Array, h0: Array, *, axis_name: str, reset: Array | None = None,
                              implementation: str | tuple[str, ...] | None = None) -> tuple[Array, Array]:
    """`linear_scan` of a sequence split along mesh axis `axis_name`."""
    before, last = _states(a, b, h0, reset, axis_name)
    return linear_scan(a, b, before, reset=reset, implementation=implementation)[0], last


def min_gru_over_sequence(hidden: Array, gate: Array, h0: Array, *, axis_name: str, reset: Array | None = None,
                          activation: str = "g",
                          implementation: str | tuple[str, ...] | None = None) -> tuple[Array, Array]:
    """`min_gru` of a sequence split along mesh axis `axis_name`."""
    before, last = _gated_states(Gates("min_gru", activation), (hidden, gate), h0, reset, axis_name)
    h, _ = min_gru(hidden, gate, before, reset=reset, activation=activation, implementation=implementation)
    return h, last


def min_lstm_over_sequence(hidden: Array, forget: Array, take: Array, h0: Array, *, axis_name: str,
                           reset: Array | None = None, activation: str = "g",
                           implementation: str | tuple[str, ...] | None = None) -> tuple[Array, Array]:
    """`min_lstm` of a sequence split along mesh axis `axis_name`."""
    before, last = _gated_states(Gates("min_lstm", activation), (hidden, forget, take), h0, reset, axis_name)
    h, _ = min_lstm(hidden, forget, take, before, reset=reset, activation=activation, implementation=implementation)
    return h, last


def _gated_states(gates: Gates, inputs: tuple[Array, ...], h0: Array, reset: Array | None, axis_name: str):
    wide = jnp.promote_types(inputs[0].dtype, jnp.float32)
    return _states(*gates(*(x.astype(wide) for x in inputs)), h0, reset, axis_name)


def _states(a: Array, b: Array, h0: Array, reset: Array | None, axis_name: str) -> tuple[Array, Array]:
    """h before this device's stretch, and after all of them."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    a, b, h0 = (x.astype(wide) for x in (a, b, h0))
    kept = a if reset is None else jnp.where(reset[..., None], 0, a)
    before, last = exchange(reduced((kept, b), affine), (jnp.ones_like(h0), h0), affine, axis_name)
    return before[1], last[1]
