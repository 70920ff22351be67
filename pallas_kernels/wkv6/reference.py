"""The definition: one step a position, differentiated by JAX. B batch, T time, H heads, K key size, V value size."""

import jax
import jax.numpy as jnp

Array = jax.Array


def forward(r: Array, w: Array, k: Array, v: Array, u: Array, state: Array,
            reset: Array | None) -> tuple[Array, Array]:
    """y [B, T, H, V] in r's dtype and the final state [B, H, K, V] in the state's. u [B, H, K]."""
    def step(state, inputs):
        r_t, w_t, k_t, v_t, reset_t = (x.astype(state.dtype) if x.dtype != bool else x for x in inputs)
        state = jnp.where(reset_t[:, None, None, None], 0, state)
        now = k_t[..., :, None] * v_t[..., None, :]
        y = jnp.sum(r_t[..., None] * (state + u[..., None] * now), axis=-2)
        return jnp.exp(w_t)[..., None] * state + now, y.astype(r.dtype)

    if reset is None:
        reset = jnp.zeros(r.shape[:2], bool)
    state, y = jax.lax.scan(step, state, tuple(jnp.moveaxis(x, 1, 0) for x in (r, w, k, v, reset)))
    return jnp.moveaxis(y, 0, 1), state
