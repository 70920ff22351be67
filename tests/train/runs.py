"""Small runs of the train step, for the tests that compare how a loss curve was made."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lm.core.batch import Batch
from lm.core.sharding import make_mesh
from lm.models.build import abstract_params, build_model, make_apply
from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions
from lm.tasks.build import build_objective
from lm.train.carried import carried_state
from lm.train.feed import to_device
from lm.train.state import Recipe
from lm.train.step import make_train_step

VOCAB, B, T = 48, 8, 16
MODEL = dict(embed_dim=32, num_layers=2, attention=dict(num_heads=4, num_kv_heads=2), mlp=dict(activation="swiglu"),
             dtype="float32", vocab_multiple=16)
SGD = dict(name="sgd", learning_rate=0.1, schedule="constant", warmup_steps=0)
ADAMW = dict(name="adamw", learning_rate=3e-3, schedule="constant", warmup_steps=0, eps=1e-6)


def packed_batch(step: int, vocab: int = VOCAB) -> Batch:
    """Rows of documents of random length with padded tails and some masked targets; a function of the step."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, vocab, (B, T + 1)).astype(np.int32)
    segments = np.zeros((B, T), np.int32)
    positions = np.zeros((B, T), np.int32)
    for row in range(B):
        cuts = np.sort(rng.choice(np.arange(1, T), 2, replace=False))
        for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, T], strict=True)):
            positions[row, start:stop] = np.arange(stop - start)
            segments[row, start:stop] = 0 if number == 2 and row % 2 else number + 1
    weights = (segments != 0) & (rng.random((B, T)) < 0.8)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights.astype(np.float32), segments, positions)


def make_recipe(model, optimizer, carry=tuple):
    def init(key):
        params = nn.meta.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32)))
        return jax.tree.map(lambda a: a.astype(model.dtype), params) if model.dtype == "float64" else params
    shapes = jax.eval_shape(init, jax.random.key(0))
    return Recipe(init, abstract_params(model), build_optimizer(OptimizerOptions(**optimizer), shapes, 100), carry)


def losses(*, optimizer=ADAMW, mesh=None, devices=None, steps=10, model=None, batch_of=packed_batch, loss=None,
           return_state=False, carry_state=False, microbatches=1, **step_options):
    """The loss of each step of a run, and the last state where asked for."""
    built = build_model({**MODEL, **(model or {})}, VOCAB)
    recipe = make_recipe(built, optimizer,
                         carried_state(built.initial_state, B, microbatches) if carry_state else tuple)
    objective = build_objective(loss or {"next_token": 1.0, "z_loss": 1e-3}, carry_state=carry_state)
    mesh = make_mesh(mesh or {"data": 1}, devices=jax.devices()[:1] if mesh is None else devices)
    with jax.set_mesh(mesh):
        state = recipe.create(0, mesh)
        step = jax.jit(make_train_step(make_apply(built), objective, recipe.optimizer, microbatches=microbatches,
                                       **step_options),
                       donate_argnums=0, out_shardings=(recipe.shardings(mesh), None))
        found = []
        for n in range(steps):
            state, metrics = step(state, to_device(batch_of(n), mesh, 0, 1))
            found.append(float(metrics["train/loss"]))
    return (np.array(found), state) if return_state else np.array(found)
