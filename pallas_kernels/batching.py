"""jax.vmap of an operation that has a batch axis already: more rows of the same kernel call."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def merged_into_batch(function: Callable) -> Callable:
    """`function` of arrays that all have the batch as axis 0, and so its results; None passes.

    Under jax.vmap the mapped axis is merged into the batch instead of becoming an axis of the kernel's grid: a larger
    batch is what the kernel is made for, and the interpreter of jax 0.10 refuses a grid longer than the dimension
    semantics that were given for it.
    """
    @custom_vmap
    def call(*arrays):
        return function(*arrays)

    @call.def_vmap
    def rule(size, mapped, *arrays):
        spread = jax.tree.map(lambda x, m: x if m else jnp.broadcast_to(x, (size, *x.shape)), arrays, tuple(mapped))
        out = call(*jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), spread))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return functools.wraps(function)(call)
