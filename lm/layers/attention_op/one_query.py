"""Attention of one query a row to a cache as it lies, for CPUs: decoding reads every key and value once and moves none.

A product a head needs the heads in front of the slots, which XLA's CPU backend copies the whole cache for. Here the
heads of a slot stay side by side, [S, G K], and the query of head h is as wide, with zeros for the heads that are not
its own: G times the arithmetic, for a quarter of the time at 65,536 slots of 4 heads, as bytes are what it waits for.

Shape legend: B batch, S keys, H heads, G key-value heads, R = H / G, K head_dim.
"""

import jax
import jax.numpy as jnp

from lm.layers.attention_op.visibility import EMPTY, Visibility

Array = jax.Array

MOST_GROUPS = 16  # with more of them the arithmetic counts


def attend_with_logsumexp(q: Array, k: Array, v: Array, see: Visibility, *, scale: float) -> tuple[Array, Array]:
    """As `blocked.attend_with_logsumexp` with T = 1: q [B, 1, H, K], k and v [B, S, G, K]."""
    batch, _, heads, dim = q.shape
    slots, groups = k.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    own = jnp.eye(groups, dtype=q.dtype)
    spread = jnp.einsum("bgrk,gj->bgrjk", q.reshape(batch, groups, heads // groups, dim), own)
    scores = jnp.einsum("bhc,bsc->bhs", spread.reshape(batch, heads, groups * dim), k.reshape(batch, slots, -1),
                        preferred_element_type=wide) * scale
    mask = see.mask((0, 1), (0, slots))
    scores = scores if mask is None else jnp.where(mask, scores, EMPTY)
    top = jnp.maximum(jax.lax.stop_gradient(scores.max(-1)), EMPTY / 2)
    weights = jnp.exp(scores - top[..., None])
    total = weights.sum(-1)
    total = jnp.where(total == 0, 1.0, total)
    out = jnp.einsum("bhs,bsc->bhc", weights.astype(v.dtype), v.reshape(batch, slots, -1), preferred_element_type=wide)
    out = jnp.einsum("bgrjk,gj->bgrk", out.reshape(batch, groups, heads // groups, groups, dim), own.astype(wide))
    out = out.reshape(batch, heads, dim) / total[..., None]
    return out[:, None].astype(q.dtype), (top + jnp.log(total))[..., None]
