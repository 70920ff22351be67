"""Products of rows with the matrix of their group: the dense layers of many experts on sorted tokens.

Shapes: P rows, E groups, D in, F out. Rows stand group after group; those after the last group have no result.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm.core.sharding import platform
from lm.core.types import Array

BLOCK = 128  # most rows of a product on CPUs, enough to use the cores


def grouped_matmul(x: Array, w: Array, sizes: Array) -> Array:
    """[P, F]: rows of x [P, D], the first sizes[0] times w[0], the next sizes[1] times w[1], and so on, w [E, D, F].

    Rows beyond the sum of `sizes` [E] int32 come out undefined, as do their gradients, and their cotangents must be 0.
    On CPUs, where `jax.lax.ragged_dot` multiplies every row with every matrix, this is a loop over blocks of rows.
    """
    return _blocked(x, w, sizes) if platform() == "cpu" else jax.lax.ragged_dot(x, w, sizes)


@jax.custom_vjp
def _blocked(x: Array, w: Array, sizes: Array) -> Array:
    size = _block_size(x.shape[0], w.shape[0])
    part = _parts(x, size)

    def block(out, at, expert, rows):
        return jax.lax.dynamic_update_slice(out, part(at) @ w[expert], (at, 0))

    # A block may reach into the next group: that group's own blocks come later and put it right.
    out = jnp.zeros((x.shape[0] + size, w.shape[2]), x.dtype)
    return _over_blocks(block, out, sizes, size)[:x.shape[0]]


def _blocked_forward(x, w, sizes):
    return _blocked(x, w, sizes), (x, w, sizes)


def _blocked_backward(saved, dy):
    x, w, sizes = saved
    size = _block_size(x.shape[0], w.shape[0])
    x_part, dy_part = _parts(x, size), _parts(dy, size)

    def block(dw, at, expert, rows):
        mine = jnp.where(jnp.arange(size)[:, None] < rows, x_part(at), 0)
        more = jnp.matmul(mine.T, dy_part(at), preferred_element_type=dw.dtype)
        return dw.at[expert].add(more)

    dw = _over_blocks(block, jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)), sizes, size)
    return _blocked(dy, w.mT, sizes), dw.astype(w.dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _block_size(rows: int, groups: int) -> int:
    """Rows of a block: about half of those of an average group, since the last block of every group is part empty."""
    return min(BLOCK, max(16, 1 << (rows // (4 * groups)).bit_length()))


def _parts(x: Array, size: int) -> Callable[[Array], Array]:
    """From its first row to the rows of a block of x; beyond the end of x they are 0."""
    padded = jnp.pad(x, ((0, size), (0, 0)))
    return lambda at: jax.lax.dynamic_slice_in_dim(padded, at, size)


def _over_blocks(block: Callable[..., Array], carry: Array, sizes: Array, size: int) -> Array:
    """carry after block(carry, first row, group, rows of the group from there on) for each block of each group."""
    counts = -(-sizes // size)
    ends, starts = jnp.cumsum(counts), jnp.cumsum(sizes) - sizes

    def step(i, carry):
        expert = jnp.searchsorted(ends, i, side="right")
        done = (i - (ends[expert] - counts[expert])) * size
        return block(carry, starts[expert] + done, expert, sizes[expert] - done)

    return jax.lax.fori_loop(0, ends[-1], step, carry)
