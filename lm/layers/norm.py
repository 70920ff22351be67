"""RMSNorm and LayerNorm, computed in float32 whatever the activations are."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.types import Array


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@partial(jax.checkpoint, static_argnums=3)  # only x is kept for the backward pass, not two more arrays of its size
def _layer_norm(x: Array, scale: Array, bias: Array | None, eps: float) -> Array:
    wide = _wide(x)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    y = y * scale.astype(wide.dtype)
    return (y if bias is None else y + bias.astype(wide.dtype)).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang & Sennrich 2019, eq. 4)."""

    eps: float = 1e-6
    axis: str | None = "activation_embed"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)), x.shape[-1:])
        wide = _wide(x)
        y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (y * scale.astype(wide.dtype)).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis (Ba et al. 2016)."""

    eps: float = 1e-5
    use_bias: bool = True
    axis: str | None = "activation_embed"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)), x.shape[-1:])
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, (self.axis,)), x.shape[-1:])
        return _layer_norm(x, scale, bias, self.eps)
