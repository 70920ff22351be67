"""Attention on a TPU: the splash attention kernel that ships with JAX (sparse block mask, segment ids, grouped heads).

It serves aligned attention whose length is a multiple of the kernel's tile. First derivatives only: the kernel has no
second ones.

Shape legend: B batch, T tokens, H heads, G key-value heads, K head_dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.sharding import platform
from lm.layers.attention_op.sharded import over_shards
from lm.layers.attention_op.visibility import Visibility

Array = jax.Array

TILE = 128  # rows of the smallest block that the kernel takes
BLOCK = 512  # rows of its blocks where the length allows


def unsupported(see: Visibility, q: Array, k: Array) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    if platform() != "tpu":
        return f"it is a TPU kernel and this is {platform()}"
    if not see.aligned:
        return "keys are not aligned with queries (a cache)"
    if q.shape[1] % TILE:
        return f"{q.shape[1]} tokens are not a multiple of {TILE}"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, not {q.dtype}"
    return None


def attend(q: Array, k: Array, v: Array, see: Visibility, *, scale: float, interpret: bool = False) -> Array:
    """Aligned attention. q [B, T, H, K], k and v [B, T, G, K] -> [B, T, H, K]; `interpret` runs on any device."""
    local = functools.partial(_local, window=see.window, scale=scale, interpret=interpret)
    return over_shards(local, q, k, v, (see.q_documents, see.k_documents))


def attend_blocks(q: Array, k: Array, v: Array, documents: tuple[Array, Array], blocks: tuple[int, int], *,
                  interpret: bool = False) -> Array:
    """Each block of `blocks[0]` rows sees itself, causally, and the `blocks[1]` blocks before it; shapes as `attend`.

    documents: [B, T] of queries and of keys, negative for an empty key.
    """
    local = functools.partial(_local, window=None, scale=q.shape[-1] ** -0.5, interpret=interpret, blocks=blocks)
    return over_shards(local, q, k, v, documents)


def _local(q, k, v, documents, *, window, scale, interpret, blocks=None):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    tokens, heads = q.shape[1:3]
    block = max(size for size in (TILE, 2 * TILE, BLOCK) if tokens % size == 0)
    if blocks is not None:
        mask = _block_mask(masks.Mask, tokens, *blocks)
    else:
        mask = masks.CausalMask((tokens, tokens)) if window is None else masks.LocalMask(
            (tokens, tokens), (window - 1, 0), 0)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1, interpret=interpret,
        block_sizes=kernels.BlockSizes(block, block, block, block, block, block, block, block))
    heads_first = [x.swapaxes(1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v)]
    if documents[1] is None:
        return jax.vmap(kernel)(*heads_first).swapaxes(1, 2).astype(q.dtype)
    out = jax.vmap(lambda q, k, v, a, b: kernel(q, k, v, kernels.SegmentIds(a, b)))(*heads_first, *documents)
    if blocks is not None:  # where its key is not empty a query sees itself, and else it is padding
        return jnp.where((documents[1] >= 0)[..., None, None], out.swapaxes(1, 2), 0).astype(q.dtype)
    # The kernel lets negative documents see each other, and returns a mean where nothing is seen. XLA fuses the
    # comparison into its reduction: [B, T, T] is never stored.
    sees = Visibility(True, 0, window, None, None, *documents).mask((0, tokens), (0, tokens)).any(-1)
    return jnp.where(sees[..., None, None], out.swapaxes(1, 2), 0).astype(q.dtype)


def _block_mask(base, tokens: int, size: int, memory: int):
    """The mask of `attend_blocks`, made tile by tile as the kernel's preparation asks for it; nothing is [T, T]."""
    class BlockMask(base):
        @property
        def shape(self):
            return (tokens, tokens)

        def __getitem__(self, index):
            rows, columns = (np.arange(tokens)[part] for part in index)
            i, j = rows[:, None], columns[None]
            return (j <= i) & (i // size - j // size <= memory)

        def __eq__(self, other):
            return isinstance(other, base) and getattr(other, "blocks", None) == self.blocks

        def __hash__(self):
            return hash(self.blocks)

    BlockMask.blocks = (tokens, size, memory)
    return BlockMask()
