"""Fast form for every backend of XLA: matrix products over chunks of positions, a scan over the chunks.

Differentiated by JAX, which keeps the state that each chunk starts from and recomputes the rest of it. Nothing in a
chunk divides, so nothing in its gradient does. B batch, T time, H heads, K key size, V value size, c positions of a
chunk.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.wkv6.config import CHUNK
from pallas_kernels.wkv6.halving import levels, product, scores, transposed

Array = jax.Array


def forward(r: Array, w: Array, k: Array, v: Array, u: Array, state: Array,
            reset: Array | None) -> tuple[Array, Array]:
    """y [B, T, H, V] in r's dtype and the final state [B, H, K, V] in the state's. u [B, H, K]."""
    length = r.shape[1]
    size = chunk_size(length)

    @jax.checkpoint
    def step(state, inputs):
        r, w, k, v, *keep = (x.astype(state.dtype) for x in inputs)
        y, state = chunk(r, jnp.exp(w), k, v, u[:, :, None], state, *keep)
        return state, y.astype(inputs[0].dtype)

    keep = () if reset is None else (split(~reset[..., None, None], size, fill=True),)
    state, y = jax.lax.scan(step, state, (*(split(x, size) for x in (r, w, k, v)), *keep))
    return joined(y, length), state


def chunk(r: Array, decay: Array, k: Array, v: Array, u: Array, state: Array,
          keep: Array | None = None) -> tuple[Array, Array]:
    """(y [..., c, V], state after) of one chunk: r, decay, k [..., c, K], v [..., c, V], u [..., 1, K].

    keep [..., c, 1] is 0 where a document starts: the past reaches neither y there nor any state after it.
    """
    past = r if keep is None else r * keep
    products = levels(decay if keep is None else decay * keep)
    whole = products[-1]
    inside = scores([past], [k], products)
    now = jnp.sum(r * u * k, axis=-1, keepdims=True)
    y = product(past * whole.before, state) + product(inside, v) + now * v
    return y, transposed(whole.total[..., :1, :]) * state + product(transposed(k * whole.after), v)


def chunk_size(length: int) -> int:
    """A power of two, not more than twice what `length` needs."""
    return min(CHUNK, 1 << (length - 1).bit_length())


def split(x: Array, size: int, fill=0) -> Array:
    """[B, T, H, N] as [chunks, B, H, size, N], `fill` after the end: log-decay 0 and key 0 leave the state alone."""
    batch, length, heads, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0)), constant_values=fill)
    return x.reshape(batch, -1, size, heads, width).transpose(1, 0, 3, 2, 4)


def joined(x: Array, length: int) -> Array:
    """The inverse of `split`: [chunks, B, H, size, N] as [B, T, H, N]."""
    chunks, batch, heads, size, width = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, chunks * size, heads, width)[:, :length]
