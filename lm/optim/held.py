"""Training a part of a parameter: the first rows along an axis keep every bit."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.core.tree import map_named
from lm.core.types import Array


def on_free(tx: optax.GradientTransformation, held: Mapping[str, tuple[int, int]]) -> optax.GradientTransformation:
    """`tx` on what is not held. held: name of a parameter to (count, axis), the first `count` places of that axis.

    What is held gets no gradient, so that neither clipping nor moments see it, and its update, in which momentum and
    weight decay may still move it, is -0.0: the one number that changes nothing when added, not even 0.0 or -0.0.
    """
    if not held:
        return tx

    def without(tree: Any, value: float) -> Any:
        return map_named(lambda name, leaf: leaf if name not in held else jnp.where(
            is_held(leaf, *held[name]), jnp.asarray(value, leaf.dtype), leaf), tree)

    def update(updates, state, params=None):
        updates, state = tx.update(without(updates, 0.0), state, params)
        return without(updates, -0.0), state

    return optax.GradientTransformation(tx.init, update)


def is_held(leaf: Array, count: int, axis: int) -> Array:
    """Bool, of the leaf's number of dimensions: where the index along `axis` is below count."""
    shape = [1] * leaf.ndim
    shape[axis] = leaf.shape[axis]
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis % leaf.ndim) < count
