"""Causal attention with grouped keys, rotary positions, query-key norm, a sliding window and a key-value cache.

Shape legend: B batch, T new tokens, S cache slots, H heads, G key-value heads, K head_dim, D embed_dim.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.sharding import constrain
from lm.core.types import Array, Aux, Context
from lm.layers.attention_op import dot_product_attention
from lm.layers.dropout import dropout
from lm.layers.linear import Dense, project
from lm.layers.norm import RMSNorm
from lm.layers.rope import rotate


class KVCache(NamedTuple):
    """The last S tokens of each row, in a ring: token number n stands in slot n mod S.

    keys, values: [B, S, G, K], keys already rotated. order: [B, S] token number in the row, for causality and window.
    documents: [B, S] document number, -1 for an empty slot. length, document: [B] tokens seen, and the number of the
    document that the row is in. With S = 0, as in training, nothing is kept.
    """

    keys: Array
    values: Array
    order: Array
    documents: Array
    length: Array
    document: Array


class Attention(nn.Module):
    """softmax(Q K^T * scale) V over the earlier tokens of the same document (Vaswani et al. 2017, eq. 1).

    num_heads: query heads; None is one for every 64 of embed_dim.
    num_kv_heads: key-value heads, shared by num_heads / num_kv_heads queries each (Ainslie et al. 2023); None is
      num_heads. head_dim: None is embed_dim / num_heads.
    rope_theta: base of the rotary angles; None for none.
    qk_norm: RMSNorm over each head's queries and keys before rotation (Henry et al. 2020).
    window: a token sees itself and the window - 1 tokens before; None is all.
    use_bias: biases in all four projections. qk_bias: biases of queries and keys, added before rotation.
    dropout: of the output.
    output_scale: multiplies the standard deviation of the output projection at initialisation.
    implementation: of the attention operation; None is the best for the platform, logged once.
    """

    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = 10_000.0
    qk_norm: bool = False
    window: int | None = None
    use_bias: bool = False
    qk_bias: bool = False
    dropout: float = 0.0
    output_scale: float | None = None
    implementation: str | None = None

    def check(self, embed_dim: int) -> None:
        """Raises ValueError where the fields do not fit together or the width."""
        heads, kv_heads = self.heads(embed_dim), self.kv_heads(embed_dim)
        if heads < 1 or kv_heads < 1:
            raise ValueError(f"attention.num_heads={heads} and num_kv_heads={kv_heads} must be at least 1")
        if self.head_dim is None and embed_dim % heads:
            raise ValueError(f"attention.num_heads={heads} does not divide embed_dim={embed_dim}; "
                             f"use a divisor, or set attention.head_dim")
        if heads % kv_heads:
            raise ValueError(f"attention.num_kv_heads={kv_heads} must divide num_heads={heads}")
        if self.rope_theta is not None and self.dim(embed_dim) % 2:
            raise ValueError(f"attention.head_dim={self.dim(embed_dim)} must be even for rotary positions; "
                             f"set rope_theta=None or an even head_dim")
        if self.rope_theta is not None and not self.rope_theta > 0:
            raise ValueError(f"attention.rope_theta={self.rope_theta} must be above 0, or None for no rotary positions")
        if self.window is not None and self.window < 1:
            raise ValueError(f"attention.window={self.window} must be at least 1, or None for no window")

    def heads(self, embed_dim: int) -> int:
        """Number of query heads."""
        return max(1, embed_dim // (self.head_dim or 64)) if self.num_heads is None else self.num_heads

    def kv_heads(self, embed_dim: int) -> int:
        """Number of key-value heads."""
        return self.heads(embed_dim) if self.num_kv_heads is None else self.num_kv_heads

    def dim(self, embed_dim: int) -> int:
        """Width of a head."""
        return embed_dim // self.heads(embed_dim) if self.head_dim is None else self.head_dim

    def flops_per_token(self, embed_dim: int, seq_len: int) -> float:
        """Forward FLOPs a token: projections, and scores and values over the keys really seen, on average over the
        row: (T + 1) / 2 for causal attention, not T."""
        dim, window = self.dim(embed_dim), min(self.window or seq_len, seq_len)
        seen = window * (window + 1) / 2 + (seq_len - window) * window
        heads, kv_heads = self.heads(embed_dim), self.kv_heads(embed_dim)
        return 4.0 * embed_dim * dim * (heads + kv_heads) + 4.0 * heads * dim * seen / seq_len

    def initial_state(self, batch_size: int, embed_dim: int, dtype: Any, *, capacity: int = 0) -> KVCache:
        """An empty cache of `capacity` slots, or of `window` slots where that is fewer."""
        slots = min(capacity, self.window) if self.window else capacity
        shape = (batch_size, slots, self.kv_heads(embed_dim), self.dim(embed_dim))
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype),
                       jnp.zeros((batch_size, slots), jnp.int32), jnp.full((batch_size, slots), -1, jnp.int32),
                       jnp.zeros((batch_size,), jnp.int32), jnp.zeros((batch_size,), jnp.int32))

    @nn.compact
    def __call__(self, x: Array, state: KVCache, ctx: Context) -> tuple[Array, KVCache, Aux]:
        B, T, D = x.shape
        H, G, K = self.heads(D), self.kv_heads(D), self.dim(D)
        q, k, v = project(x, Dense(H * K, ("embed", "heads"), self.use_bias or self.qk_bias, name="query"),
                          Dense(G * K, ("embed", "kv_heads"), self.use_bias or self.qk_bias, name="key"),
                          Dense(G * K, ("embed", "kv_heads"), self.use_bias, name="value"))
        q, k, v = q.reshape(B, T, H, K), k.reshape(B, T, G, K), v.reshape(B, T, G, K)
        if self.qk_norm:
            q, k = RMSNorm(axis="head_dim", name="query_norm")(q), RMSNorm(axis="head_dim", name="key_norm")(k)
        if self.rope_theta is not None:
            q, k = rotate(q, ctx.positions, self.rope_theta), rotate(k, ctx.positions, self.rope_theta)
        q = constrain(q, "batch", "length", "heads", "head_dim")
        k = constrain(k, "batch", "length", "kv_heads", "head_dim")
        v = constrain(v, "batch", "length", "kv_heads", "head_dim")
        y, state = attend(q, k, v, state, ctx, self.window, self.implementation)
        y = constrain(y, "batch", "length", "heads", "head_dim").reshape(B, T, H * K)
        scale = 1.0 if self.output_scale is None else self.output_scale
        y = Dense(D, ("heads", "embed"), self.use_bias, scale, name="out")(y)
        return dropout(y, self.dropout, ctx.key), state, {}


def attend(q: Array, k: Array, v: Array, cache: KVCache, ctx: Context, window: int | None,
           implementation: str | None) -> tuple[Array, KVCache]:
    """Attention of T new tokens to themselves and the cache, and the cache after them.

    q: [B, T, H, K]; k, v: [B, T, G, K]. Padding (weight 0) is neither seen nor stored.
    """
    present = ctx.weights != 0
    documents = cache.document[:, None] + jnp.cumsum(ctx.reset, axis=1, dtype=jnp.int32)  # [B, T]
    k_documents = jnp.where(present, documents, -1)
    T, slots = k.shape[1], cache.keys.shape[1]
    if slots == 0:
        y = dot_product_attention(q, k, v, q_documents=documents, k_documents=k_documents, window=window,
                                  aligned=True, implementation=implementation)
        return y, cache
    order = cache.length[:, None] + jnp.cumsum(present, axis=1, dtype=jnp.int32) - 1
    length = cache.length + jnp.sum(present, axis=1, dtype=jnp.int32)
    # Of more new tokens than slots only the last are kept; the rest and padding go to a slot that does not exist.
    keep = present & (order >= length[:, None] - slots)
    slot = jnp.where(keep, order % slots, slots)
    rows = jnp.arange(k.shape[0])[:, None]

    def write(old, new):
        at = slot
        if at.size == 1:  # A second write, to nowhere: one alone becomes a slice update, which XLA's CPU backend
            # (jax 0.10.2) then does once for each reader of the cache, in a copy of it.
            at, new = jnp.concatenate([at, jnp.full_like(at, slots)], axis=1), jnp.concatenate([new, new], axis=1)
        return old.at[rows, at].set(new.astype(old.dtype), mode="drop")

    after = KVCache(write(cache.keys, k), write(cache.values, v), write(cache.order, order),
                    write(cache.documents, documents), length, documents[:, -1])
    if T == 1:  # the new token's own key is in the cache by now, and what it overwrote is out of its reach
        keys, values, k_order, k_documents = after.keys, after.values, after.order, after.documents
    else:
        keys, values = (jnp.concatenate([old.astype(new.dtype), new], axis=1)
                        for old, new in ((cache.keys, k), (cache.values, v)))
        k_order = jnp.concatenate([cache.order, order], axis=1)
        k_documents = jnp.concatenate([cache.documents, k_documents], axis=1)
    y = dot_product_attention(q, keys.astype(q.dtype), values.astype(q.dtype), q_positions=order, k_positions=k_order,
                              q_documents=documents, k_documents=k_documents, window=window, aligned=False,
                              implementation=implementation)
    return y, jax.tree.map(lambda old, new: new.astype(old.dtype), cache, after)
