"""Fast form for every backend of XLA: matrix products over chunks of positions, a scan over the chunks.

Differentiated by JAX, which keeps the state that each chunk starts from and recomputes the rest of it. Nothing in a
chunk divides, so nothing in its gradient does. B batch, T time, H heads, K key size, V value size, c positions of a
chunk.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import vary_alike
from pallas_kernels.wkv6.chunked import joined, split
from pallas_kernels.wkv6.halving import levels, product, scores, transposed
from pallas_kernels.wkv7.config import CHUNK
from pallas_kernels.wkv7.solve import solve

Array = jax.Array


def forward(r: Array, w: Array, k: Array, v: Array, a: Array, b: Array, state: Array,
            reset: Array | None) -> tuple[Array, Array]:
    """y [B, T, H, V] in r's dtype and the final state [B, H, K, V] in the state's."""
    length = r.shape[1]
    size = min(CHUNK, 1 << (length - 1).bit_length())

    @jax.checkpoint
    def step(state, inputs):
        r, w, k, v, a, b, *keep = (x.astype(state.dtype) for x in inputs)
        y, state = chunk(r, jnp.exp(w), k, v, a, b, state, *keep)
        return state, y.astype(inputs[0].dtype)

    keep = () if reset is None else (split(~reset[..., None, None], size, fill=True),)
    state, y = jax.lax.scan(step, state, (*(split(x, size) for x in (r, w, k, v, a, b)), *keep))
    return joined(y, length), state


def chunk(r: Array, decay: Array, k: Array, v: Array, a: Array, b: Array, state: Array,
          keep: Array | None = None) -> tuple[Array, Array]:
    """(y [..., c, V], state after) of one chunk; r, decay, k, a, b [..., c, K], v [..., c, V], keep [..., c, 1].

    keep is 0 where a document starts: the past reaches neither a there nor any state after it.
    """
    length = r.shape[-2]
    if keep is not None:
        a, decay = a * keep, decay * keep
    products = levels(decay)
    whole = products[-1]
    read = r * decay                            # y_t reads S_t, which has decayed once more than S_{t-1}
    inside = scores([a, read], [b, k], products)
    a_b, a_k = inside[..., :length, :length], inside[..., :length, length:]
    r_b, r_k = inside[..., length:, :length], inside[..., length:, length:]
    # In a chunk of one position a_b is a constant: under jax.shard_map it varies over no axis, until told.
    removed = solve(*vary_alike(a_b, product(a * whole.before, state) + product(a_k, v)))
    dot = lambda x, y: jnp.sum(x * y, axis=-1, keepdims=True)
    y = (product(read * whole.before, state) + product(r_k, v) + product(r_b, removed)
         + dot(r, k) * v + dot(r, b) * removed)
    state = (transposed(whole.total[..., :1, :]) * state + product(transposed(k * whole.after), v)
             + product(transposed(b * whole.after), removed))
    return y, state
