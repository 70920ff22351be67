"""Numbers about states and predictions that are looped: how far they moved, how much alike they are.

B batch, T time, D width.
"""

import jax
import jax.numpy as jnp

from lm.core.types import Array, Context


def kl(before: Array, now: Array) -> Array:
    """KL(softmax(before) || softmax(now)) over the last axis, in nats, never below 0."""
    p, q = jax.nn.log_softmax(before), jax.nn.log_softmax(now)
    return jnp.maximum(jnp.sum(jnp.where(jnp.isneginf(before), 0, jnp.exp(p) * (p - q)), axis=-1), 0)


def mean_cosine(s: Array, weights: Array) -> Array:
    """Mean cosine between the states [B, T, D] of any two tokens that are no padding, without gradient: 1 is a
    collapse. By |sum u|^2 = n + sum over pairs of u v."""
    s = jax.lax.stop_gradient(s).astype(jnp.float32)
    present = (weights != 0)[..., None]
    unit = jnp.where(present, s * jax.lax.rsqrt(jnp.sum(jnp.square(s), -1, keepdims=True) + 1e-12), 0)
    n = jnp.sum(present, dtype=jnp.float32)
    return (jnp.sum(jnp.square(jnp.sum(unit, axis=(0, 1)))) - n) / jnp.maximum(n * (n - 1), 1)


def last_of(s: Array, before: Array, ctx: Context) -> Array:
    """[B, D]: the state of each row's last token that is no padding; `before` where there is none."""
    place = jnp.max(jnp.where(ctx.weights != 0, jnp.arange(s.shape[1]), -1), axis=1)
    found = jnp.take_along_axis(s, jnp.maximum(place, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where((place >= 0)[:, None], found, before.astype(s.dtype)).astype(before.dtype)
