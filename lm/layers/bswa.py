"""Block sliding-window attention: the baseline of TransformerFAM (Hwang et al. 2024, arXiv:2404.09173, section 2.1).

Shape legend: B batch, T time, H heads, G key-value heads, K head_dim, D embed_dim, c block, m memory.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from lm.core.sharding import constrain
from lm.core.types import Array, Aux, Context
from lm.layers.block_sliding import block_sliding_attention, chunking
from lm.layers.dropout import dropout
from lm.layers.linear import Dense, project
from lm.layers.norm import RMSNorm
from lm.layers.rope import rotate
from lm.layers.segments import Cut, Ring, check_fields, chunks_behind, heads_of, keys_seen, places, scattered


class BSWA(nn.Module):
    """Attention of each block of tokens to itself, causally, and to the whole of the `memory` blocks before it.

    A token sees memory * block + 1 to (memory + 1) * block tokens, itself included; L layers see L * memory blocks
    back. The state is a ring of memory + 1 blocks.

    num_heads, num_kv_heads, head_dim, rope_theta, qk_norm, use_bias, dropout, output_scale: as of `attention`.
    block: tokens of a block.
    memory: blocks before its own that a token sees; 0 is none.
    cut: where blocks begin: anew with each document, or by the row, which is what the TPU kernel's static mask needs.
    stop_gradient: no gradient flows into keys and values of earlier blocks (Transformer-XL does so).
    same_reach: in place of whole blocks a token sees the memory * block tokens before it (Transformer-XL's mask).
    implementation: splash, cudnn, xla or reference; None is the best for the platform, logged once.
    """

    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = 10_000.0
    qk_norm: bool = False
    use_bias: bool = False
    dropout: float = 0.0
    output_scale: float | None = None
    block: int = 1024
    memory: int = 3
    cut: Cut = "document"
    stop_gradient: bool = False
    same_reach: bool = False
    implementation: str | None = None

    def check(self, embed_dim: int) -> None:
        """Raises ValueError where the fields do not fit together or the width."""
        check_fields(self, "bswa", embed_dim)

    def flops_per_token(self, embed_dim: int, seq_len: int) -> float:
        """Forward FLOPs a token: projections, and scores and values over the keys that it sees on average."""
        heads, groups, dim = heads_of(self, embed_dim)
        return 4.0 * embed_dim * dim * (heads + groups) + 4.0 * heads * dim * keys_seen(self.block, self.memory,
                                                                                       seq_len)

    def initial_state(self, batch_size: int, embed_dim: int, dtype: Any, *, capacity: int = 0) -> Ring:
        """A ring of memory + 1 blocks, or of `capacity` slots where that is fewer."""
        _, groups, dim = heads_of(self, embed_dim)
        return Ring.empty(batch_size, min(capacity, (self.memory + 1) * self.block), groups, dim, dtype)

    @nn.compact
    def __call__(self, x: Array, state: Ring, ctx: Context) -> tuple[Array, Ring, Aux]:
        q, k, v = heads_from(self, x, ctx.positions)
        T, where = x.shape[1], places(state, ctx, self.cut)
        new, slots = where.keys(k, v), state.order.shape[1]
        aligned = self.cut == "row" and slots == 0  # then chunks are blocks
        count, _ = chunking(T, self.block)
        behind, several = chunks_behind(self.memory, count, slots, aligned), count > 1
        past = state.in_order(behind * self.block) if several and slots else state.as_it_lies()
        y = block_sliding_attention(
            where.queries(q, self.block, self.memory, self.same_reach), new, past, block=self.block, behind=behind,
            stop_gradient=self.stop_gradient, row_memory=self.memory if aligned and not self.same_reach else None,
            implementation=self.implementation)
        if several:
            y = jnp.where(scattered(where.present)[:, None, None, None], jnp.nan, y).astype(y.dtype)
        y = dropout(output(self, y, x.shape[-1]), self.dropout, ctx.key)
        return y, state.after(new, where), {}


def heads_from(layer: Any, x: Array, positions: Array) -> tuple[Array, Array, Array]:
    """q [B, T, H, K], k and v [B, T, G, K] of x [B, T, D], rotated; names its parameters in the layer's own scope."""
    B, T, D = x.shape
    H, G, K = heads_of(layer, D)
    q, k, v = project(x, Dense(H * K, ("embed", "heads"), layer.use_bias, name="query"),
                      Dense(G * K, ("embed", "kv_heads"), layer.use_bias, name="key"),
                      Dense(G * K, ("embed", "kv_heads"), layer.use_bias, name="value"))
    q, k, v = q.reshape(B, T, H, K), k.reshape(B, T, G, K), v.reshape(B, T, G, K)
    if layer.qk_norm:
        q, k = RMSNorm(axis="head_dim", name="query_norm")(q), RMSNorm(axis="head_dim", name="key_norm")(k)
    if layer.rope_theta is not None:
        q, k = rotate(q, positions, layer.rope_theta), rotate(k, positions, layer.rope_theta)
    q = constrain(q, "batch", "length", "heads", "head_dim")
    k = constrain(k, "batch", "length", "kv_heads", "head_dim")
    return q, k, constrain(v, "batch", "length", "kv_heads", "head_dim")


def output(layer: Any, y: Array, embed_dim: int) -> Array:
    """[B, T, D] of the heads' results [B, T, H, K]; names its parameters in the layer's own scope."""
    y = constrain(y, "batch", "length", "heads", "head_dim").reshape(*y.shape[:2], -1)
    scale = 1.0 if layer.output_scale is None else layer.output_scale
    return Dense(embed_dim, ("heads", "embed"), layer.use_bias, scale, name="out")(y)
