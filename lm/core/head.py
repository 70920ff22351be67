"""Logits from hidden states and the output projection: what losses and generation both start from."""

import jax.numpy as jnp

from lm.core.sharding import current_mesh
from lm.core.types import Array, Head


def logits_of(hidden: Array, head: Head) -> Array:
    """Float32 logits [..., V] of hidden states [..., D]; entries beyond the real vocabulary are minus infinity."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    rows = hidden if current_mesh() is not None else hidden.reshape(-1, hidden.shape[-1])  # see `linear.matmul`
    logits = jnp.einsum("...d,vd->...v", rows, head.kernel.astype(hidden.dtype), preferred_element_type=wide)
    logits = logits.reshape(*hidden.shape[:-1], logits.shape[-1])
    if head.bias is not None:
        logits = logits + head.bias.astype(wide)
    if head.softcap is not None:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    if head.vocab_size < head.kernel.shape[0]:
        logits = jnp.where(jnp.arange(head.kernel.shape[0]) < head.vocab_size, logits, -jnp.inf)
    return logits
