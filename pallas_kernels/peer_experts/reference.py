"""The definition: gathers every row of every token, differentiated by JAX.

B batch, T time, P = heads * k experts a token, N experts, R rows of an expert (down, up, and gate if R = 3), D width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def forward(activation: Callable, x: Array, ids: Array, gates: Array, table: Array) -> Array:
    """y [B, T, D] in x's dtype. ids [B, T, P] outside of the table have gates of 0."""
    wide = wide_dtype(x, gates, table)
    x_wide, rows = x.astype(wide), table.astype(wide).at[ids].get(mode="clip")
    inner = lambda r: jnp.einsum("btd,btpd->btp", x_wide, rows[..., r, :], precision=jax.lax.Precision.HIGHEST)
    hidden = activation(inner(0))
    if table.shape[1] == 3:
        hidden = hidden * inner(2)
    y = jnp.einsum("btp,btpd->btd", gates.astype(wide) * hidden, rows[..., 1, :],
                   precision=jax.lax.Precision.HIGHEST)
    return y.astype(x.dtype)


def wide_dtype(*arrays: Array) -> jnp.dtype:
    """What is computed and accumulated in: float32, or float64 if an array is."""
    return jnp.result_type(jnp.float32, *(x.dtype for x in arrays))
