"""Work through the time axis a chunk after the other: temporaries are those of one chunk, whatever the length.

Arrays are sliced as they lie, [B, T, ...] on axis 1, and results are written in place; no transposes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Tree = object


def scan_time(chunk: Callable, size: int, carry: Tree, *arrays: jax.Array) -> tuple[Tree, Tree]:
    """(carry, results [B, T, ...]) of carry, out = chunk(carry, *arrays[:, start:start + size]) over all chunks.

    The last chunk may be shorter. Differentiable: the loop has a fixed number of trips.
    """
    batch, length = arrays[0].shape[:2]
    whole, tail = divmod(length, size)
    part = lambda start, size: [jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in arrays]
    if whole == 1 and not tail:
        return chunk(carry, *arrays)
    shapes = jax.eval_shape(chunk, carry, *part(0, size))[1]
    out = jax.tree.map(lambda x: jnp.zeros((batch, length, *x.shape[2:]), x.dtype), shapes)
    out = jax.tree.map(lambda x: _varying_as(x, arrays[0]), out)

    def step(i, carry_and_out, size=size):
        carry, out = carry_and_out
        carry, results = chunk(carry, *part(i, size))
        return carry, jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, i, axis=1), out, results)

    state = jax.lax.fori_loop(0, whole, lambda i, state: step(i * size, state), (carry, out))
    return step(whole * size, state, tail) if tail else state


def over_time(chunk: Callable, size: int, *arrays: jax.Array) -> Tree:
    """Results [B, T, ...] of chunk(*arrays[:, start:start + size]) over all chunks."""
    return scan_time(lambda carry, *parts: (carry, chunk(*parts)), size, (), *arrays)[1]


def _varying_as(x: jax.Array, of: jax.Array) -> jax.Array:
    """x varying over the mesh axes of jax.shard_map that `of` varies over: loops want one type for what they carry."""
    axes = tuple(sorted(jax.typeof(of).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying))
    return jax.lax.pcast(x, axes, to="varying") if axes else x
