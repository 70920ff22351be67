"""The definition: one step a position, differentiated by JAX. B batch, T time, C channels."""

import jax
import jax.numpy as jnp

Array = jax.Array


def forward(a: Array, b: Array, h0: Array, reset: Array | None) -> tuple[Array, Array]:
    """h [B, T, C] in b's dtype and the final state [B, C] in h0's."""
    def step(h, inputs):
        a_t, b_t, reset_t = inputs
        h = a_t * jnp.where(reset_t, 0, h) + b_t
        return h, h.astype(b.dtype)

    time_major = lambda x: jnp.swapaxes(x, 0, 1)
    if reset is None:
        reset = jnp.zeros(a.shape[:2], bool)
    h_last, h = jax.lax.scan(step, h0, (time_major(a), time_major(b), time_major(reset)[..., None]))
    return time_major(h), h_last


def min_gru(hidden: Array, gate: Array) -> tuple[Array, Array]:
    """(a, b) of minGRU from pre-activations, hidden already activated."""
    return jax.nn.sigmoid(-gate), jax.nn.sigmoid(gate) * hidden


def min_lstm(hidden: Array, forget: Array, take: Array) -> tuple[Array, Array]:
    """(a, b) of minLSTM: f / (f + i) and i / (f + i) as sigmoids of log f - log i and of its negative."""
    ratio = jax.nn.log_sigmoid(forget) - jax.nn.log_sigmoid(take)
    return jax.nn.sigmoid(ratio), jax.nn.sigmoid(-ratio) * hidden


def positive(x: Array) -> Array:
    """g(x) = x + 1/2 from 0 on, sigmoid(x) below: positive and continuous; its slope at 0 is that from the right, 1."""
    return jnp.where(x >= 0, x + 0.5, jax.nn.sigmoid(x))


UNITS = {"min_gru": min_gru, "min_lstm": min_lstm}
ACTIVATIONS = {"g": positive, "identity": lambda x: x, "tanh": jnp.tanh}
