"""Training a part of the parameters: the rest gets no gradient, no update and no optimizer state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def select(tree: Any, mask: Any) -> Any:
    """`tree` with an empty node for every leaf where `mask` is False; those leaves of `tree` may themselves be empty.

    Gradients with respect to `select(params, mask)` cost nothing for the rest.
    """
    return jax.tree.map(lambda keep, leaf: leaf if keep else optax.MaskedNode(), mask, tree)


def restore(selected: Any, tree: Any, mask: Any) -> Any:
    """The whole tree again: leaves of `selected` where `mask` is True, of `tree` elsewhere."""
    return jax.tree.map(lambda keep, new, old: new if keep else old, mask, selected, tree)


def on_trainable(tx: optax.GradientTransformation, mask: Any) -> optax.GradientTransformation:
    """`tx` as if the parameters where `mask` is False did not exist; their updates are zero.

    The gradients may be a whole tree or one that `select` made.
    """

    def init(params):
        return tx.init(select(params, mask))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("this optimizer needs the parameters in update(updates, state, params)")
        updates, state = tx.update(select(updates, mask), state, select(params, mask))
        return restore(updates, jax.tree.map(jnp.zeros_like, params), mask), state

    return optax.GradientTransformation(init, update)
