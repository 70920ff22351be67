"""The definition: one step a position, differentiated by JAX. B batch, T time, H heads, K key size, V value size."""

import jax
import jax.numpy as jnp

Array = jax.Array


def forward(r: Array, w: Array, k: Array, v: Array, a: Array, b: Array, state: Array,
            reset: Array | None) -> tuple[Array, Array]:
    """y [B, T, H, V] in r's dtype and the final state [B, H, K, V] in the state's."""
    def step(state, inputs):
        r_t, w_t, k_t, v_t, a_t, b_t, reset_t = (x.astype(state.dtype) if x.dtype != bool else x for x in inputs)
        state = jnp.where(reset_t[:, None, None, None], 0, state)
        removed = jnp.sum(a_t[..., None] * state, axis=-2)
        state = (jnp.exp(w_t)[..., None] * state + b_t[..., :, None] * removed[..., None, :]
                 + k_t[..., :, None] * v_t[..., None, :])
        return state, jnp.sum(r_t[..., None] * state, axis=-2).astype(r.dtype)

    if reset is None:
        reset = jnp.zeros(r.shape[:2], bool)
    state, y = jax.lax.scan(step, state, tuple(jnp.moveaxis(x, 1, 0) for x in (r, w, k, v, a, b, reset)))
    return jnp.moveaxis(y, 0, 1), state
