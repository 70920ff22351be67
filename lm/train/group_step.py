"""The train step of several runs that differ in seed, learning rate and weight decay only, as one program.

Every array of the state, the scalars, and where their data differ the batch, has a leading axis of runs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lm.core.batch import Batch
from lm.core.types import Apply, Array, Objective
from lm.optim.builder import Optimizer, build_optimizer
from lm.optim.scalars import Scalars, same_program, scalars_of
from lm.train.options import TrainOptions
from lm.train.state import Recipe, TrainState
from lm.train.step import make_train_step

GroupStep = Callable[[TrainState, Scalars, Batch], tuple[TrainState, dict[str, Array]]]


def make_group_step(apply: Apply, objective: Objective, recipe: Recipe, options: TrainOptions, *,
                    shared_batch: bool) -> GroupStep:
    """(states, scalars, batch) to (states, metrics), everything [N, ...] but a shared batch; to be jitted.

    recipe, options: of one of the runs. A run whose loss or gradient is not finite stays as it is, as alone, and the
    others go on.
    """
    shapes = nn.meta.unbox(recipe.boxed)

    def one(state: TrainState, scalars: Scalars, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        optimizer = build_optimizer(recipe.optimizer.options, shapes, options.steps, scalars=scalars)
        return make_train_step(apply, objective, optimizer, microbatches=options.microbatches,
                               skip_nonfinite=options.on_nonfinite == "skip",
                               per_microbatch=options.per_microbatch)(state, batch)

    return jax.vmap(one, in_axes=(0, 0, None if shared_batch else 0))


def stacked_scalars(optimizers: Sequence[Optimizer]) -> Scalars:
    """The scalars of the runs, [N, ...]. Raises ValueError where their optimizers are not of one program."""
    for optimizer in optimizers[1:]:
        if not same_program(optimizers[0].rows, optimizer.rows):
            raise ValueError("these runs cannot share a program: weight decay or a multiplier is off in one and on in "
                             "another")
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(scalars_of(one.options, one.rows) for one in optimizers))


@jax.jit
def stack(trees: Sequence[Any]) -> Any:
    """Trees of arrays as one, with a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def pick(tree: Any, index: Array) -> Any:
    """The index-th of what `stack` made."""
    return jax.tree.map(lambda leaf: leaf[index], tree)
