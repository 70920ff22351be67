"""The model's state carried from one step to the next: truncated backpropagation through time.

The rows of a batch go on where they ended in the batch before (`data.packing="lanes"`), the state that they ended with
is the state that they begin with. It enters a step as data, so no gradient flows into the step before.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.types import Carry, State

_LONG = 1 << 20  # tokens: more than any constant state has room for


def carried_state(initial_state: Callable[..., State], batch_size: int, microbatches: int = 1) -> Callable[[], Carry]:
    """What makes the first carry: the state before the first token of every row, [microbatches, ...] in each leaf,
    boxed with its logical axes, of which the axis of rows is one.

    initial_state(batch_size, capacity=N): a model's. Raises ValueError where the state grows with the text.
    """
    rows = batch_size // microbatches
    make = lambda rows, capacity=_LONG: initial_state(rows, capacity=capacity)
    shapes, fewer, longer = (jax.eval_shape(lambda given=given: make(*given))
                             for given in ((rows,), (rows + 1,), (rows, 2 * _LONG)))
    named = zip(jax.tree.leaves_with_path(shapes), jax.tree.leaves(longer), strict=True)
    growing = [jax.tree_util.keystr(path) for (path, a), b in named if a.shape != b.shape]
    if growing:
        raise ValueError(f"train.carry_state needs a state of constant size, and that of this model keeps every token "
                         f"({growing[0]} and {len(growing) - 1} more); give attention a window, or "
                         f"use recurrent layers")

    def boxed(leaf, shape, other):
        names = tuple("batch" if a != b else None for a, b in zip(shape.shape, other.shape, strict=True))
        return nn.LogicallyPartitioned(jnp.broadcast_to(leaf, (microbatches, *leaf.shape)), (None, *names))

    return lambda: jax.tree.map(boxed, make(rows), shapes, fewer)
