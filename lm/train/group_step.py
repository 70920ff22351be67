"""The train step of several runs that differ in seed, learning rate and weight decay only, as one program.

Every array of the state, the scalars, and where their data differ the batch, has a leading axis of runs.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

from lm.core.axes import RUNS
from lm.core.batch import Batch
from lm.core.types import Apply, Array, Objective
from lm.optim.builder import Optimizer, build_optimizer
from lm.optim.scalars import Scalars, same_program, scalars_of
from lm.train.options import TrainOptions
from lm.train.state import Recipe, TrainState
from lm.train.step import make_train_step

WAYS = ("vmap", "map")
GroupStep = Callable[[TrainState, Scalars, Batch], tuple[TrainState, dict[str, Array]]]


def make_group_step(apply: Apply, objective: Objective, recipe: Recipe, options: TrainOptions, *,
                    shared_batch: bool, way: str = "vmap", mesh: Mesh | None = None) -> GroupStep:
    """(states, scalars, batch) to (states, metrics), everything [N, ...] but a shared batch; to be jitted.

    recipe, options: of one of the runs. way: what a device does with several runs: "vmap", every operation on all of
    them; "map", one run after the other, a loop in the program. mesh: of `lm.train.places`, where each device has some
    of the runs. A run whose loss or gradient is not finite stays as it is, as alone, and the others go on.
    """
    shapes = nn.meta.unbox(recipe.boxed)

    def one(state: TrainState, scalars: Scalars, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        optimizer = build_optimizer(recipe.optimizer.options, shapes, options.steps, scalars=scalars)
        return make_train_step(apply, objective, optimizer, microbatches=options.microbatches,
                               skip_nonfinite=options.on_nonfinite == "skip",
                               per_microbatch=options.per_microbatch)(state, batch)

    def in_turn(states: TrainState, scalars: Scalars, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        if shared_batch:
            return jax.lax.map(lambda own: one(*own, batch), (states, scalars))
        return jax.lax.map(lambda own: one(*own), (states, scalars, batch))

    several = {"vmap": jax.vmap(one, in_axes=(0, 0, None if shared_batch else 0)), "map": in_turn}[way]
    if mesh is None or mesh.size == 1:
        return several
    own = PartitionSpec(RUNS)
    return jax.shard_map(several, mesh=mesh, in_specs=(own, own, PartitionSpec() if shared_batch else own),
                         out_specs=own, check_vma=False)


def stacked_scalars(optimizers: Sequence[Optimizer]) -> Scalars:
    """The scalars of the runs, [N, ...]. Raises ValueError where their optimizers are not of one program."""
    for optimizer in optimizers[1:]:
        if not same_program(optimizers[0].rows, optimizer.rows):
            raise ValueError("these runs cannot share a program: weight decay or a multiplier is off in one and on in "
                             "another")
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(scalars_of(one.options, one.rows) for one in optimizers))
