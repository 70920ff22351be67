"""The state of a run: everything that a step changes, in one tree, with the sharding of each array."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.core.sharding import shardings
from lm.core.types import Array, Carry, Key, Params, PyTree
from lm.optim.builder import Optimizer
from lm.optim.state_sharding import opt_state_shardings
from lm.train.guard import Guard, fresh_guard


class TrainState(NamedTuple):
    """step: int32 updates done. params: variables of the model. opt_state: the optimizer's. carry: the objective's.
    ema: averaged parameters, or None. key: typed PRNG key of the run; a step's key is this one folded by the step.
    bad_step: first step whose loss or gradient was not finite and that was not skipped, else -1; from then on nothing
    changes. skips: skipped updates in a row; skipped: in all. guard: what spikes are told by, or None."""

    step: Array
    params: Params
    opt_state: PyTree
    carry: Carry
    ema: Params | None
    key: Key
    bad_step: Array
    skips: Array
    skipped: Array
    guard: Guard | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is needed to make a state: `init(key)` gives fresh variables, `boxed` their shapes with logical axes,
    `carry()` the objective's carry before the first step, boxed likewise where it is split; spike_window: updates that
    the guard sees, None for no guard."""

    init: Callable[[Key], Params]
    boxed: PyTree
    optimizer: Optimizer
    carry: Callable[[], Carry] = tuple
    spike_window: int | None = None

    def fresh(self, seed: int | Array) -> TrainState:
        """The state before the first step. Pure; meant to be traced."""
        key = jax.random.key(seed)
        params = self.init(jax.random.fold_in(key, 0))
        return self.around(params, jax.random.fold_in(key, 1))

    def around(self, params: Params, key: Key) -> TrainState:
        """The state before the first step from these parameters."""
        ema = params if self.optimizer.options.ema_decay is not None else None
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, self.optimizer.tx.init(params),
                          nn.meta.unbox(self.carry()), jax.tree.map(jnp.array, ema), key,
                          bad_step=zero - 1, skips=zero, skipped=zero,
                          guard=None if self.spike_window is None else fresh_guard(self.spike_window))

    def shardings(self, mesh: Mesh) -> TrainState:
        """The sharding of every array of the state: parameters by their axes, moments and averages like them."""
        shapes = jax.eval_shape(lambda: self.fresh(0))
        params = shardings(self.boxed, mesh)
        whole = NamedSharding(mesh, PartitionSpec())
        return TrainState(
            step=whole, params=params, opt_state=opt_state_shardings(self.optimizer.tx, shapes.params, params, mesh),
            carry=shardings(jax.eval_shape(self.carry), mesh), ema=None if shapes.ema is None else params,
            key=whole, bad_step=whole, skips=whole, skipped=whole, guard=jax.tree.map(lambda _: whole, shapes.guard))

    def abstract(self, mesh: Mesh) -> TrainState:
        """Shapes, dtypes and shardings of the state; nothing is allocated."""
        return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
                            jax.eval_shape(lambda: self.fresh(0)), self.shardings(mesh))

    def create(self, seed: int, mesh: Mesh) -> TrainState:
        """The state before the first step, every array made where it belongs."""
        return jax.jit(self.fresh, out_shardings=self.shardings(mesh))(seed)
