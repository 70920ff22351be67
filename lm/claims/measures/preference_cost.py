"""What a step of learning from preferences costs: counted FLOPs and bytes of the compiled step, and its time.

The compiler's own counts are taken, so the model must not be scanned: the body of a loop is counted once.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.batch import ReferencedBatch
from lm.data.loader import build_dataset
from lm.data.options import DataOptions
from lm.models.build import build_model, init_params, make_apply
from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions
from lm.tasks.build import build_objective
from lm.train.state import Recipe
from lm.train.step import make_train_step

STEPS = 12  # timed; the median counts


def preference_cost(config: Any) -> dict[str, float]:
    """Of the config's model, loss and batch:

      forward_flops: FLOPs of the loss alone; step_flops: of the whole train step. state_bytes: arguments of the step
      (parameters, moments, reference, batch); model_bytes: the parameters'; temporary_bytes: what the step allocates
      besides. seconds_per_step: median.
    """
    train = config.train
    data = build_dataset(DataOptions(**config.data.to_dict()), batch_size=train.batch_size, seq_len=train.seq_len,
                         seed=train.seed)
    model = build_model(config.model.to_dict(), data.tokenizer.vocab_size)
    params, apply = init_params(model, jax.random.key(train.seed)), make_apply(model)
    objective, batch = build_objective(config.loss.to_dict()), data.batch(0)
    if config.loss.get("reference") == "cached":
        batch = ReferencedBatch(*batch, jnp.zeros(batch.tokens.shape, jnp.float32))
    carry = jax.tree.map(jnp.copy, params) if objective.keeps_copy(adapters=False) else ()
    optimizer = build_optimizer(OptimizerOptions(**config.optimizer.to_dict()), params, train.steps)
    state = Recipe(lambda key: params, None, optimizer, lambda: carry).around(params, jax.random.key(0))
    state = jax.tree.map(jnp.copy, state)  # no array twice: all are given away

    def loss(params, carry, batch):
        means, _, _ = objective(apply, params, carry, batch, None)
        return sum(objective.weights[name] * mean.value for name, mean in means.items())

    forward = jax.jit(loss).lower(params, carry, batch).compile()
    step = jax.jit(make_train_step(apply, objective, optimizer), donate_argnums=0).lower(state, batch).compile()
    memory = step.memory_analysis()
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    counted = {"forward_flops": forward.cost_analysis()["flops"], "step_flops": step.cost_analysis()["flops"],
               "state_bytes": memory.argument_size_in_bytes, "temporary_bytes": memory.temp_size_in_bytes,
               "model_bytes": size(params)}
    seconds = []
    for _ in range(STEPS + 2):
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - begin)
    return {**{name: float(value) for name, value in counted.items()},
            "seconds_per_step": statistics.median(seconds[2:])}
