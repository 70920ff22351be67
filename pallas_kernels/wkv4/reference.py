"""The definition: one step a position, differentiated by JAX. B batch, T time, C channels.

The past is a sum of weights e^(..) and the sum of the values under them, both as multiples of e^p, where p is the
largest exponent so far: nothing overflows, and the weights never sum to less than 1.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
EMPTY = -1e30       # log of the weight of no past; finite, because -inf - -inf is NaN


def forward(w: Array, u: Array, k: Array, v: Array, state: Array, reset: Array | None) -> tuple[Array, Array]:
    """y [B, T, C] in v's dtype and the final state [B, 2, C] in state's; w, u [B, C] in state's dtype."""
    def step(carry, inputs):
        a, b, p = carry
        k_t, v_t, reset_t = inputs
        a, b, p = jnp.where(reset_t, 0, a), jnp.where(reset_t, 1, b), jnp.where(reset_t, EMPTY, p)
        top = jnp.maximum(p, u + k_t)
        past, now = jnp.exp(p - top), jnp.exp(u + k_t - top)
        y = (past * a + now * v_t) / (past * b + now)
        top = jnp.maximum(p - w, k_t)
        past, now = jnp.exp(p - w - top), jnp.exp(k_t - top)
        return (past * a + now * v_t, past * b + now, top), y.astype(v.dtype)

    time_major = lambda x: jnp.swapaxes(x, 0, 1)
    if reset is None:
        reset = jnp.zeros(k.shape[:2], bool)
    mean, log_weight = state[:, 0], state[:, 1]
    (a, b, p), y = jax.lax.scan(step, (mean, jnp.ones_like(mean), log_weight),
                                (time_major(k), time_major(v), time_major(reset)[..., None]))
    return time_major(y), jnp.stack([a / b, p + jnp.log(b)], axis=1)
