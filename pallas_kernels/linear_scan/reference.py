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
