"""Attention as the textbook writes it: the whole [B, H, T, S] score matrix. The definition the others are held to.

Shape legend: B batch, T queries, S keys, H heads, G key-value heads, R = H / G, K head_dim.
"""

import jax
import jax.numpy as jnp

from lm.layers.attention_op.visibility import Visibility

Array = jax.Array


def attend(q: Array, k: Array, v: Array, see: Visibility, *, scale: float) -> Array:
    """softmax(scale q k^T) v over the visible keys, in float32 at least; q [B, T, H, K], k and v [B, S, G, K] -> as q.

    A query that sees no key gives 0, with zero gradient.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    heads = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("btgrk,bsgk->bgrts", heads, k, preferred_element_type=wide) * scale
    mask = see.mask((0, q.shape[1]), (0, k.shape[1]))
    if mask is None:
        probabilities = jax.nn.softmax(scores, axis=-1)
    else:
        # Both `where` are needed: the first keeps masked scores out of the sum, the second empties rows without a key.
        mask = mask[:, None, None]
        probabilities = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1), 0.0)
    out = jnp.einsum("bgrts,bsgk->btgrk", probabilities, v, preferred_element_type=wide)
    return out.reshape(q.shape).astype(q.dtype)
