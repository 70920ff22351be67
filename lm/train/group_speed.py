"""How long a step of several runs takes, one run after the other and all in one program, measured in turns."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lm.train.feed import data_shard, to_device
from lm.train.group_step import make_group_step, stack, stacked_scalars
from lm.train.loop import Experiment
from lm.train.options import TrainOptions
from lm.train.step import make_train_step

ROUNDS = 5  # of a choice: the medians of so many


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step of all runs: `alone` one after the other, `together` in one program; one a round."""

    alone: Sequence[float]
    together: Sequence[float]

    @property
    def ratio(self) -> float:
        """Median throughput together over that alone."""
        return statistics.median(self.alone) / statistics.median(self.together)


def step_times(experiments: Sequence[Experiment], options: TrainOptions, mesh: Mesh, rounds: int = ROUNDS) -> Times:
    """Times of these runs on one batch, from fresh states that are thrown away. Call under `jax.set_mesh(mesh)`.

    Alone, every step is waited for only where the last of all is, as the train loop lets steps follow each other.
    """
    first = experiments[0]
    batch = to_device(first.batch_at(0, *data_shard(mesh, options.batch_size, options.seq_len)), mesh, 0, 1)
    one = jax.jit(make_train_step(first.apply, first.objective, first.recipe.optimizer,
                                  microbatches=options.microbatches, skip_nonfinite=options.on_nonfinite == "skip",
                                  per_microbatch=options.per_microbatch), donate_argnums=0)
    several = jax.jit(make_group_step(first.apply, first.objective, first.recipe, options, shared_batch=True),
                      donate_argnums=0)
    rates = jax.device_put(stacked_scalars([experiment.recipe.optimizer for experiment in experiments]))
    fresh = jax.jit(first.recipe.fresh)
    state = fresh(options.seed)
    states = stack([state] * len(experiments))

    def alone() -> Any:
        nonlocal state
        for _ in experiments:
            state, metrics = one(state, batch)
        return metrics

    def together() -> Any:
        nonlocal states
        states, metrics = several(states, rates, batch)
        return metrics

    for run in (alone, together):
        jax.block_until_ready(run())  # compiles
    return Times(*zip(*((_seconds(alone), _seconds(together)) for _ in range(rounds)), strict=True))


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began
