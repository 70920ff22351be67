"""Our side of `lm bench orpo`: the train step that `lm train` runs with loss=dict(orpo=...), from the same weights.

Arguments: T, ids of the vocabulary, file of the weights, and "default" or "chunked" (the logits of a part of a row at a
time, as many as where they do not fit, made again in the backward pass).
"""

import sys

import flax
import jax
import numpy as np
import orbax.checkpoint  # noqa: F401  what `lm train` has imported before its first step

from launch.bench import gpt2, sizes
from launch.bench.pairs import ODDS_WEIGHT, PAIRS, pairs
from launch.bench.side import serve
from lm.core.batch import Batch
from lm.core.sharding import make_mesh
from lm.core.tree import num_params
from lm.losses.chunks import CHUNK_ELEMENTS
from lm.models.build import abstract_params, build_model, make_apply
from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions
from lm.tasks.build import build_objective
from lm.train.feed import to_device
from lm.train.one_at_a_time import OneAtATime
from lm.train.state import Recipe
from lm.train.step import make_train_step


def rows(seq_len: int, vocab: int) -> Batch:
    """A pair a row, as `lm data prepare --kind preference` packs them: prompt and chosen, then prompt and rejected."""
    given = pairs(seq_len, vocab)
    documents = [np.concatenate([given.prompt, response], axis=1) for response in (given.chosen, given.rejected)]
    tokens = np.concatenate(documents, axis=1)
    targets = np.concatenate([np.roll(document, -1, axis=1) for document in documents], axis=1)
    place = np.arange(seq_len)
    answered = (place >= given.prompt.shape[1] - 1) & (place < seq_len - 1)
    twice = lambda row, dtype: np.broadcast_to(np.concatenate([row, row]).astype(dtype), tokens.shape)
    segments = np.broadcast_to(np.repeat(np.array([1, 2], np.int32), seq_len), tokens.shape)
    return Batch(tokens, targets, twice(answered, np.float32), segments, twice(place, np.int32))


def chunk(vocab: int) -> int:
    """Positions of a row whose logits exist at a time where those of all are too many to be held."""
    return max(1, CHUNK_ELEMENTS["cpu"] // (PAIRS * vocab))


def build():
    """(step, facts)."""
    seq_len, vocab = int(sys.argv[1]), int(sys.argv[2])
    model = build_model(gpt2.config(seq_len), vocab)
    with np.load(sys.argv[3]) as saved:
        weights = gpt2.from_torch(dict(saved))
    boxed = abstract_params(model)
    shapes = flax.linen.meta.unbox(boxed)
    assert jax.tree.map(lambda a: a.shape, weights) == jax.tree.map(lambda a: a.shape, shapes)
    b1, b2 = sizes.BETAS
    optimizer = build_optimizer(OptimizerOptions(
        name="adamw", learning_rate=sizes.LEARNING_RATE, schedule="constant", warmup_steps=0, b1=b1, b2=b2,
        eps=sizes.EPS, weight_decay=0.0, clip_norm=None), shapes, 1000)
    # As TRL has it by default: the likelihood is that of the prompt too, a mean over tokens.
    objective = build_objective({"orpo": {"odds_weight": ODDS_WEIGHT, "sft_tokens": "all", "sft_average": "tokens"},
                                 "chunk": chunk(vocab) if sys.argv[4] == "chunked" else None})
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    batch = to_device(rows(seq_len, vocab), mesh, 0, 1)
    state = Recipe(lambda key: weights, boxed, optimizer).create(0, mesh)
    run = OneAtATime(jax.jit(make_train_step(make_apply(model), objective, optimizer), donate_argnums=0))

    def step() -> float:
        nonlocal state
        state, metrics = run(state, batch)
        return float(jax.block_until_ready(metrics)["train/loss"])

    return step, {"version": f"jax {jax.__version__}, flax {flax.__version__}", "parameters": num_params(weights),
                  "tokens_per_step": 2 * PAIRS * seq_len}


if __name__ == "__main__":
    serve(build)
