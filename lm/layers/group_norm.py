"""Norm of every head by itself, as the RWKV models normalise what they read from their state."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.types import Array


class HeadNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) over each head's channels, then scale and bias by channel (Wu & He 2018).

    x [B, T, H, K] -> [B, T, H * K] in x's dtype; statistics in float32. start: initial value of scale.
    """

    eps: float = 64e-5

    @nn.compact
    def __call__(self, x: Array, start: Array | float = 1.0) -> Array:
        width = x.shape[-2] * x.shape[-1]
        init = lambda key, shape, dtype=jnp.float32: jnp.full(shape, start, dtype)
        scale = self.param("scale", nn.with_logical_partitioning(init, ("heads",)), (width,))
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("heads",)), (width,))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (y.reshape(*x.shape[:2], width) * scale + bias).astype(x.dtype)
