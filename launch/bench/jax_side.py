"""Our side: the train step that `lm train` runs, with the weights that the other side wrote.

Arguments: module of the model (`launch.bench.gpt2`), T, weights, and rows of a batch if not the usual. Without weights
("") it starts from the model's own.
"""

import importlib
import sys

import flax
import jax
import numpy as np
import orbax.checkpoint  # noqa: F401  what `lm train` has imported before its first step

from launch.bench import sizes
from launch.bench.side import serve
from lm.core.batch import Batch
from lm.core.sharding import make_mesh
from lm.core.tree import num_params
from lm.models.build import abstract_params, build_model, init_params, make_apply
from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions
from lm.tasks.build import build_objective
from lm.train.feed import to_device
from lm.train.one_at_a_time import OneAtATime
from lm.train.state import Recipe
from lm.train.step import make_train_step


def build():
    """(step, facts)."""
    kind, seq_len = importlib.import_module(sys.argv[1]), int(sys.argv[2])
    rows = int(sys.argv[4]) if sys.argv[4:] else sizes.BATCH
    model = build_model(kind.config(seq_len), sizes.VOCAB)
    if sys.argv[3]:
        with np.load(sys.argv[3]) as saved:
            weights = kind.from_torch(dict(saved))
    else:
        weights = flax.linen.meta.unbox(init_params(model, jax.random.key(0)))
    boxed = abstract_params(model)
    shapes = flax.linen.meta.unbox(boxed)
    assert jax.tree.map(lambda a: a.shape, weights) == jax.tree.map(lambda a: a.shape, shapes)
    b1, b2 = sizes.BETAS
    optimizer = build_optimizer(OptimizerOptions(
        name="adamw", learning_rate=sizes.LEARNING_RATE, schedule="constant", warmup_steps=0, b1=b1, b2=b2,
        eps=sizes.EPS, weight_decay=sizes.WEIGHT_DECAY, clip_norm=None,
        rules=({"match": ".*", "weight_decay": sizes.WEIGHT_DECAY},)), shapes, 1000)
    recipe = Recipe(lambda key: weights, boxed, optimizer)
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    tokens = sizes.tokens(seq_len, rows)
    shape = (rows, seq_len)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones(shape, np.float32), np.ones(shape, np.int32),
                  np.broadcast_to(np.arange(seq_len, dtype=np.int32), shape))
    batch = to_device(batch, mesh, 0, 1)
    state = recipe.create(0, mesh)
    objective = build_objective({"next_token": 1.0})
    run = OneAtATime(jax.jit(make_train_step(make_apply(model), objective, optimizer), donate_argnums=0))

    def step() -> float:
        nonlocal state
        state, metrics = run(state, batch)
        return float(jax.block_until_ready(metrics)["train/loss"])

    return step, {"version": f"jax {jax.__version__}, flax {flax.__version__}", "parameters": num_params(weights),
                  "flops_per_step": 3 * model.flops_per_token(seq_len) * rows * seq_len}


if __name__ == "__main__":
    serve(build)
