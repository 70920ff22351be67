"""Attention on an NVIDIA GPU: cuDNN's flash attention through `jax.nn.dot_product_attention`.

Documents become an additive mask [B, 1, T, S], of which the kernel reads T x S entries a row: fine at a few thousand
tokens, and stated here because it is not linear in the length. First derivatives only.

Shape legend: B batch, T queries, S keys, H heads, G key-value heads, K head_dim.
"""

import functools

import jax
import jax.numpy as jnp

from lm.core.sharding import platform
from lm.layers.attention_op.sharded import over_shards
from lm.layers.attention_op.visibility import Visibility

Array = jax.Array


def unsupported(see: Visibility, q: Array, k: Array) -> str | None:
    """Why cuDNN cannot serve these arguments, or None."""
    if platform() != "gpu":
        return f"it is an NVIDIA library and this is {platform()}"
    if not see.aligned:
        return "keys are not aligned with queries (a cache)"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"it takes a head_dim that is a multiple of 8 up to 128, not {q.shape[3]}"
    if q.shape[1] < 2 or q.shape[1] % 2:
        return f"its backward pass takes an even number of tokens, not {q.shape[1]}"
    return None


def attend(q: Array, k: Array, v: Array, see: Visibility, *, scale: float) -> Array:
    """Aligned attention. q [B, T, H, K], k and v [B, T, G, K] -> [B, T, H, K]."""
    local = functools.partial(_local, window=see.window, scale=scale)
    return over_shards(local, q, k, v, (see.q_documents, see.k_documents))


def _local(q, k, v, documents, *, window, scale):
    call = functools.partial(jax.nn.dot_product_attention, scale=scale, is_causal=True, implementation="cudnn",
                             local_window_size=None if window is None else (window - 1, 0))
    if documents[1] is None:
        return call(q, k, v)
    tokens = q.shape[1]
    mask = Visibility(True, 0, window, None, None, *documents).mask((0, tokens), (0, tokens))
    return jnp.where(mask.any(-1)[..., None, None], call(q, k, v, mask=mask[:, None]), 0)
