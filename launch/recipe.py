"""What a run trains and how: from checked options to the recipe of its state and to its objective.

`lm train` runs it, and `lm plan` compiles it for machines that are not here, in a process that may have jax and flax
but no data libraries: nothing here reads data, nor the config of `ml_collections`.
"""

from collections.abc import Mapping
from typing import Any


def objective_of(model: Any, train: Any, loss: Mapping[str, Any]) -> Any:
    """What is minimised. train: TrainOptions; loss: the group, resolved or not."""
    from lm.models.build import not_additive
    from lm.tasks.build import build_objective
    return build_objective(loss, carry_state=train.carry_state, pass_memory=train.pass_memory,
                           initial_state=model.initial_state, not_additive=not_additive(model))


def recipe_of(model: Any, train: Any, optimizer: Any, loss: Mapping[str, Any]) -> Any:
    """The `lm.train.state.Recipe`: initial variables with what is trained beside them, the optimizer and the first
    carry. optimizer: OptimizerOptions. Raises ValueError for what the model cannot carry or train."""
    import jax
    from flax import linen as nn

    from launch import adapters, preference
    from lm.core.tree import axes_of
    from lm.models.build import abstract_params, initial_variables
    from lm.models.tables import tables_of
    from lm.optim.builder import build_optimizer
    from lm.optim.mup import resolve
    from lm.tasks.passed_memory import first_carry
    from lm.train.carried import carried_state
    from lm.train.state import Recipe
    boxed = abstract_params(model)
    if adapters.used(train):
        boxed |= jax.eval_shape(lambda: adapters.beside(train, model, nn.meta.unbox(boxed["params"]),
                                                        jax.random.key(0)))
        optimizer = adapters.rules(train, optimizer)
    optimizer = resolve(optimizer, nn.meta.unbox(boxed), axes_of(boxed), model.transfer)

    def init(key):
        params = nn.meta.unbox(initial_variables(model, key))
        return {**params, **adapters.beside(train, model, params["params"], jax.random.fold_in(key, 1))}

    carry = tuple
    if train.carry_state:
        carry = carried_state(model.initial_state, train.batch_size, train.microbatches)
    if train.pass_memory is not None:
        carry = first_carry(model.initial_state)
    carry = preference.copy_of(loss, train, boxed) or carry
    return Recipe(init, boxed, build_optimizer(optimizer, nn.meta.unbox(boxed), train.steps, tables_of(model)), carry,
                  train.guard_window)
