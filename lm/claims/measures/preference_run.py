"""One model, taught on both responses of made pairs, then moved by a preference loss: what it gained, and at what cost.

The model before the second stage is the reference of losses that need one, and what all are compared with.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lm.core.types import Apply, Params
from lm.data.loader import build_dataset
from lm.data.options import DataOptions
from lm.data.synthetic.base import Draw
from lm.data.synthetic.style_pairs import END, GOOD
from lm.eval.preference import Preference
from lm.eval.sets import set_of
from lm.generate.decode import generate
from lm.losses.preference import Orpo
from lm.losses.preference.reference import REFERENCE
from lm.models.build import build_model, init_params, make_apply
from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions
from lm.tasks.build import build_objective
from lm.train.state import Recipe
from lm.train.step import make_train_step

TAUGHT = {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 20, "weight_decay": 0.0}
PROMPTS, BATCHES = 256, 8


def preference_run(config: Any) -> dict[str, float]:
    """Metrics of the moved model on new pairs (`lm.eval.preference`: accuracy, kl, logp_margin, ...), and of what it
    writes to new prompts, sampled: `length` in contents, `length_drift` against the reference, `good` (share of good
    marks), `win_rate` against the reference by that share (ties half), and `length_win_rate`, by length alone.

    The first stage takes `train.steps` steps, the second `eval.every` of them with the config's loss and optimizer.
    """
    train = config.train
    data = DataOptions(**config.data.to_dict())
    size = dict(batch_size=train.batch_size, seq_len=train.seq_len)
    rows = build_dataset(data, seed=train.seed, **size)
    model = build_model(config.model.to_dict(), rows.tokenizer.vocab_size)
    apply = make_apply(model)
    reference = fit(apply, init_params(model, jax.random.key(train.seed)), {"next_token": 1.0}, TAUGHT, rows, 0,
                    train.steps)
    moved = fit(apply, reference, config.loss.to_dict(), config.optimizer.to_dict(), rows, train.steps,
                config.eval.every)
    held = set_of(build_dataset(data, split="validation", **size), BATCHES)
    # Judged alike: by mean log-probabilities, whatever reward the loss has.
    found = dict(Preference({"pairs": held}, Orpo())(apply, {**moved, REFERENCE: reference}))
    written = [sample(apply, model.initial_state, params, data.build_task(), train.seed) for params in
               (moved, reference)]
    return {**{name.rsplit("/", 1)[1]: value for name, value in found.items()}, **compare(*written)}


def fit(apply: Apply, params: Params, loss: Mapping[str, Any], optimizer: Mapping[str, Any], rows: Any, first: int,
        steps: int) -> Params:
    """The parameters after `steps` steps from batch `first` on; a reference copy is of those before."""
    objective = build_objective(loss)
    keeps = getattr(objective, "keeps_copy", lambda adapters: False)(adapters=False)
    made = build_optimizer(OptimizerOptions(**optimizer), params, steps)
    state = Recipe(lambda key: params, None, made, lambda: params if keeps else ()).around(params, jax.random.key(0))
    step = jax.jit(make_train_step(apply, objective, made))
    for number in range(first, first + steps):
        state, report = step(state, rows.batch(number))
    if not np.isfinite(float(report["train/loss"])):
        raise FloatingPointError(f"the loss of {loss} is not finite")
    return state.params


def sample(apply: Apply, initial_state: Any, params: Params, task: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(contents written, share of good marks) of a response to each of PROMPTS new prompts, temperature 1."""

    made = task.rows(Draw(seed + 1, np.arange(PROMPTS)), 3 * task.document)
    prompts = made.tokens[:, :2 * task.num_contents]
    out = generate(apply, params, initial_state, list(prompts), max_new_tokens=2 * task.num_contents + 1, seed=seed,
                   stop_tokens=(END,))
    marks = [row.tokens[1::2] for row in out.rows]
    return (np.array([np.sum(row.tokens != END) / 2 for row in out.rows]),
            np.array([np.mean(found == GOOD) if len(found) else 0.0 for found in marks]))


def compare(moved: tuple[np.ndarray, np.ndarray], before: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """What is said of two sets of responses to the same prompts."""
    share = lambda a, b: float(np.mean((np.sign(a - b) + 1) / 2))
    return {"length": float(moved[0].mean()), "length_drift": float(moved[0].mean() - before[0].mean()),
            "good": float(moved[1].mean()), "good_before": float(before[1].mean()),
            "win_rate": share(moved[1], before[1]), "length_win_rate": share(moved[0], before[0])}
