"""What an adapter with a magnitude does to the columns of a kernel (DoRA: Liu et al. 2024, arXiv:2402.09353)."""

import jax
import jax.numpy as jnp


def column_scale(kernel: jax.Array, a: jax.Array, b: jax.Array, magnitude: jax.Array) -> jax.Array:
    """magnitude / ||W + a b||, one number an output: W' = (W + a b) * scale has columns of length `magnitude` (eq. 5).

    kernel: [..., in, out]; a: [..., in, r]; b: [..., r, out]; magnitude and the result: [..., out] float32. No gradient
    flows through the norm (section 4.3), which is that of the weights to an output, as the authors' code has it.
    """
    norm = jax.lax.stop_gradient(column_norm(kernel, a, b))
    return magnitude / jnp.where(norm == 0, 1, norm)  # rows of padding in a vocabulary are zero


def column_norm(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """||W + a b|| over the inputs, [..., out] float32."""
    whole = kernel.astype(jnp.float32) + jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32))
    return jnp.sqrt(jnp.sum(jnp.square(whole), axis=-2))
