"""Attention on a TPU: the splash attention kernel that ships with JAX (sparse block mask, segment ids, grouped heads).

It serves aligned attention whose length is a multiple of the kernel's tile. First derivatives only: the kernel has no
second ones.

Shape legend: B batch, T tokens, H heads, G key-value heads, K head_dim.
"""

import functools

import jax
import jax.numpy as jnp

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


def _local(q, k, v, documents, *, window, scale, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    tokens, heads = q.shape[1:3]
    block = max(size for size in (TILE, 2 * TILE, BLOCK) if tokens % size == 0)
    causal = masks.CausalMask((tokens, tokens)) if window is None else masks.LocalMask(
        (tokens, tokens), (window - 1, 0), 0)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([causal] * heads), head_shards=1, q_seq_shards=1, interpret=interpret,
        block_sizes=kernels.BlockSizes(block, block, block, block, block, block, block, block))
    heads_first = [x.swapaxes(1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v)]
    if documents[1] is None:
        return jax.vmap(kernel)(*heads_first).swapaxes(1, 2).astype(q.dtype)
    out = jax.vmap(lambda q, k, v, a, b: kernel(q, k, v, kernels.SegmentIds(a, b)))(*heads_first, *documents)
    # The kernel lets negative documents see each other, and returns a mean where nothing is seen. XLA fuses the
    # comparison into its reduction: [B, T, T] is never stored.
    sees = Visibility(True, 0, window, None, None, *documents).mask((0, tokens), (0, tokens)).any(-1)
    return jnp.where(sees[..., None, None], out.swapaxes(1, 2), 0).astype(q.dtype)
