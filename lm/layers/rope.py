"""Rotary position embedding (Su et al. 2021, eq. 34), in the half-split layout of Llama."""

import jax.numpy as jnp

from lm.core.types import Array


def rotate(x: Array, positions: Array, theta: float) -> Array:
    """Rotates pairs (x[i], x[i + K/2]) by positions * theta^(-2i/K).

    x: [B, T, H, K] with even K; positions: [B, T]. Angles and products are float32. Same dtype as x.
    """
    half = x.shape[-1] // 2
    wide = jnp.promote_types(x.dtype, jnp.float32)
    frequency = theta ** (-jnp.arange(half, dtype=wide) / half)
    angle = positions[..., None, None].astype(wide) * frequency  # [B, T, 1, K/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(wide), x[..., half:].astype(wide)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
