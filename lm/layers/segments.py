"""What layers with blocks of tokens share: where each token stands in its block, and the ring of the last blocks.

Shape legend: B batch, T new tokens, S ring slots, G key-value heads, K head_dim, c block, m memory.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lm.core.types import Array, Context
from lm.layers.block_sliding import Keys, Queries

Cut = Literal["document", "row"]


class Ring(NamedTuple):
    """The last S tokens of each row: token number n stands in slot n mod S.

    keys, values: [B, S, G, K], keys already rotated. order: [B, S] token number. documents: [B, S] document number, -1
    for an empty slot. length, document, start: [B] tokens seen, number of the document that the row is in, and the
    number of its first token.
    """

    keys: Array
    values: Array
    order: Array
    documents: Array
    length: Array
    document: Array
    start: Array

    @classmethod
    def empty(cls, batch_size: int, slots: int, groups: int, dim: int, dtype: Any) -> "Ring":
        """Nothing seen yet."""
        shape, zero = (batch_size, slots), jnp.zeros((batch_size,), jnp.int32)
        return cls(jnp.zeros((*shape, groups, dim), dtype), jnp.zeros((*shape, groups, dim), dtype),
                   jnp.zeros(shape, jnp.int32), jnp.full(shape, -1, jnp.int32), zero, zero, zero)

    def as_it_lies(self) -> Keys:
        """The slots, in no order."""
        return Keys(self.keys, self.values, self.order, self.documents)

    def in_order(self, size: int) -> Keys:
        """The last `size` tokens, oldest first; empty where there are fewer. The ring must have slots."""
        slots = self.order.shape[1]
        order = self.length[:, None] - size + jnp.arange(size)
        there = (order >= 0) & (jnp.arange(size) >= size - slots)
        slot = order % slots
        take = lambda x: jnp.take_along_axis(x, slot.reshape(*slot.shape, *[1] * (x.ndim - 2)), axis=1)
        return Keys(take(self.keys), take(self.values), order, jnp.where(there, take(self.documents), -1))

    def after(self, new: Keys, places: "Places") -> "Ring":
        """The ring once the new tokens are in it; padding is not, and of more tokens than slots only the last are."""
        slots = self.order.shape[1]
        if slots == 0:
            return self
        length = self.length + jnp.sum(places.present, axis=1, dtype=jnp.int32)
        keep = places.present & (new.order >= length[:, None] - slots)
        slot = jnp.where(keep, new.order % slots, slots)  # the others go to a slot that does not exist
        rows = jnp.arange(slot.shape[0])[:, None]
        write = lambda old, value: old.at[rows, slot].set(value.astype(old.dtype), mode="drop")
        return Ring(write(self.keys, new.keys), write(self.values, new.values), write(self.order, new.order),
                    write(self.documents, new.document), length, places.document[:, -1], places.start[:, -1])


class Places(NamedTuple):
    """Where the T tokens of a call stand, each [B, T]. order: number in the row. document: number of the document.
    start: number of its first token. index: place in the run that is cut into blocks, the document or the row.
    present: no padding."""

    order: Array
    document: Array
    start: Array
    index: Array
    present: Array

    def queries(self, q: Array, block: int, memory: int, same_reach: bool = False) -> Queries:
        """q [B, T, H, K] and what it sees: its own block, and `memory` blocks before; with same_reach, in place of
        these, the memory * block tokens before each query (Transformer-XL)."""
        own = self.order - self.index % block
        reach = self.order - memory * block
        first = jnp.minimum(own, reach) if same_reach else own - memory * block
        return Queries(q, self.order, self.document, first, own)

    def keys(self, k: Array, v: Array) -> Keys:
        """The new tokens as keys, padding as empty ones."""
        return Keys(k, v, self.order, jnp.where(self.present, self.document, -1))


def places(ring: Ring, ctx: Context, cut: Cut) -> Places:
    """Where the tokens of `ctx` stand after those of `ring`."""
    present = ctx.weights != 0
    seen = ring.length[:, None] + jnp.cumsum(present, axis=1, dtype=jnp.int32)
    before = seen - present
    document = ring.document[:, None] + jnp.cumsum(ctx.reset, axis=1, dtype=jnp.int32)
    start = jnp.maximum(ring.start[:, None], jax.lax.cummax(jnp.where(ctx.reset, before, -1), axis=1))
    order = seen - 1
    return Places(order, document, start, order - start if cut == "document" else order, present)


def chunks_behind(memory: int, chunks: int, slots: int, aligned: bool) -> int:
    """Chunks before its own that a query of a call with so many may look into, with `slots` of a ring before the call.
    aligned: chunks are blocks; else a block may begin in the chunk before. Without a ring there is nothing before the
    call, whatever the memory."""
    most = memory + (0 if aligned else 1)
    return most if slots else min(most, chunks - 1)


def scattered(present: Array) -> Array:
    """[B]: whether a real token stands behind padding, which chunks of a call cannot serve."""
    return jnp.any(present[:, 1:] & ~present[:, :-1], axis=1)


def heads_of(layer: Any, embed_dim: int) -> tuple[int, int, int]:
    """(query heads, key-value heads, width of one) of a layer with these fields, as `Attention` has them."""
    heads = layer.num_heads if layer.num_heads is not None else max(1, embed_dim // (layer.head_dim or 64))
    groups = heads if layer.num_kv_heads is None else layer.num_kv_heads
    return heads, groups, embed_dim // heads if layer.head_dim is None else layer.head_dim


def check_fields(layer: Any, kind: str, embed_dim: int) -> None:
    """Raises ValueError where heads, rotary positions or blocks of a layer do not fit together or the width."""
    if (layer.num_heads is not None and layer.num_heads < 1) or (layer.num_kv_heads or 1) < 1:
        raise ValueError(f"{kind}.num_heads={layer.num_heads} and num_kv_heads={layer.num_kv_heads} must be at least 1")
    heads, groups, dim = heads_of(layer, embed_dim)
    if layer.head_dim is None and embed_dim % heads:
        raise ValueError(f"{kind}.num_heads={heads} does not divide embed_dim={embed_dim}; use a divisor, or set "
                         f"{kind}.head_dim")
    if heads % groups:
        raise ValueError(f"{kind}.num_kv_heads={groups} must divide num_heads={heads}")
    if layer.rope_theta is not None and (dim % 2 or not layer.rope_theta > 0):
        raise ValueError(f"{kind}: rotary positions need an even head_dim and rope_theta above 0; got {dim} and "
                         f"{layer.rope_theta}; rope_theta=None is without them")
    if layer.block < 1 or layer.memory < 0:
        raise ValueError(f"{kind}.block={layer.block} must be at least 1 and {kind}.memory={layer.memory} at least 0")
    if (layer.memory + 1) * layer.block >= 2**31:
        raise ValueError(f"{kind}.block={layer.block} and {kind}.memory={layer.memory} make a window of "
                         f"{(layer.memory + 1) * layer.block} tokens, which 32 bits do not count; windows as long as a "
                         f"row see all of it")


def keys_seen(block: int, memory: int, seq_len: int) -> float:
    """Keys that a token of a row of seq_len sees on average, itself included."""
    total = 0
    for start in range(0, seq_len, block):
        size = min(block, seq_len - start)
        total += size * min(start, memory * block) + size * (size + 1) // 2
    return total / seq_len
