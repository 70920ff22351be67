"""One adapter a sequence: every row of a batch trains its own copy, all at once (test-time training).

Shapes: N sequences; leaves of stacked adapters are [N, ...].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def stack_lora(lora: Any, n: int) -> Any:
    """`n` equal copies of an adapter tree, stacked on a new leading axis."""
    if n < 1:
        raise ValueError(f"the number of adapters must be at least 1; got {n}")
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n, *leaf.shape)), lora)


def init_per_example(tx: optax.GradientTransformation, loras: Any) -> Any:
    """The optimizer state of every adapter of a stacked tree, stacked likewise."""
    return jax.vmap(tx.init)(loras)


def per_example_step(loss_fn: Callable[[Any, Any, Any], jax.Array], tx: optax.GradientTransformation) -> Callable:
    """A gradient step of every adapter on its own example.

    Args:
      loss_fn: (params, lora, example) -> scalar loss; an example is a batch without its leading axis.
      tx: an optax transformation of one adapter tree. Norms that it takes (clipping) are those of one adapter.

    Returns `step(params, loras, opt_states, examples) -> (loras, opt_states, losses [N])`, which maps over the leading
    axis of everything but `params`, and equals a loop over the sequences.
    """

    def one(params, lora, opt_state, example):
        loss, grads = jax.value_and_grad(loss_fn, argnums=1)(params, lora, example)
        updates, opt_state = tx.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, loss

    return jax.vmap(one, in_axes=(None, 0, 0, 0))
