"""How long a step of several runs takes, one run after the other and all in one program, measured in turns."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lm.core.sharding import platform
from lm.train.feed import data_shard, to_device
from lm.train.group_step import WAYS, make_group_step, stacked_scalars
from lm.train.loop import Experiment
from lm.train.options import TrainOptions
from lm.train.places import Places
from lm.train.step import make_train_step

ROUNDS = 5  # of a choice: the medians of so many
TURN = 0.1  # seconds that a turn lasts at least: on one of a millisecond, chance has a large part


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step of all runs: `alone` one after the other, `together` in one program, by way; one a round.
    cores: this process's CPU time in a second, medians by way and of "alone"."""

    alone: Sequence[float]
    together: Mapping[str, Sequence[float]]
    cores: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def way(self) -> str:
        """The fastest way together."""
        return min(self.together, key=lambda way: statistics.median(self.together[way]))

    @property
    def ratio(self) -> float:
        """Median throughput together over that alone."""
        return statistics.median(self.alone) / statistics.median(self.together[self.way])


def step_times(experiments: Sequence[Experiment], options: TrainOptions, mesh: Mesh, devices: Sequence[Any],
               rounds: int = ROUNDS, alone: tuple[Experiment, Mesh] | None = None) -> Times:
    """Times of these runs on one batch, from fresh states that are thrown away.

    experiments: of the runs on `mesh`, one device; together they are spread over `devices`. alone: a run as it would
    be if it had the machine, and its mesh; where not given, as it is on `mesh`.

    Alone, every step is waited for only where the last of all is, as the train loop lets steps follow each other. On
    CPUs, where one operation on all runs may be slower than the same on each, both ways of a program are tried.
    """
    single, alone_mesh = (experiments[0], mesh) if alone is None else alone
    runs = {"alone": _alone(single, alone_mesh, options, len(experiments))}
    for way in WAYS if platform() == "cpu" else WAYS[:1]:
        runs[way] = _together(experiments, options, mesh, devices, way)
    steps = {}
    for name, run in runs.items():
        jax.block_until_ready(run())  # compiles
        steps[name] = math.ceil(TURN / min(TURN, _turn(run, 1)[0]))
    turns = [{name: _turn(run, steps[name]) for name, run in runs.items()} for _ in range(rounds)]
    seconds = {name: [each[name][0] for each in turns] for name in runs}
    cores = {name: statistics.median(each[name][1] for each in turns) for name in runs}
    return Times(seconds.pop("alone"), seconds, cores)


def _alone(experiment: Experiment, mesh: Mesh, options: TrainOptions, count: int) -> Callable[[], Any]:
    step = jax.jit(make_train_step(experiment.apply, experiment.objective, experiment.recipe.optimizer,
                                   microbatches=options.microbatches, skip_nonfinite=options.on_nonfinite == "skip",
                                   per_microbatch=options.per_microbatch), donate_argnums=0)
    with jax.set_mesh(mesh):
        batch = to_device(first_batch(experiment, mesh, options), mesh, 0, 1)
        state = experiment.recipe.create(options.seed, mesh)

    def run() -> Any:
        nonlocal state
        with jax.set_mesh(mesh):
            for _ in range(count):
                state, metrics = step(state, batch)
        return metrics
    return run


def _together(experiments: Sequence[Experiment], options: TrainOptions, mesh: Mesh, devices: Sequence[Any],
              way: str) -> Callable[[], Any]:
    first, places = experiments[0], Places(len(experiments), devices)
    step = jax.jit(make_group_step(first.apply, first.objective, first.recipe, options, shared_batch=True, way=way,
                                   mesh=places.mesh), donate_argnums=0)
    optimizers = places.filled([experiment.recipe.optimizer for experiment in experiments])
    rates = jax.device_put(stacked_scalars(optimizers), places.split)
    with jax.set_mesh(mesh):
        states = places.put([first.recipe.create(options.seed, mesh)] * len(experiments))
        batch = jax.device_put(first_batch(first, mesh, options), places.whole)

    def run() -> Any:
        nonlocal states
        with jax.set_mesh(places.mesh):
            states, metrics = step(states, rates, batch)
        return metrics
    return run


def first_batch(experiment: Experiment, mesh: Mesh, options: TrainOptions) -> Any:
    """A run's rows of step 0, on the host."""
    return experiment.batch_at(0, *data_shard(mesh, options.batch_size, options.seq_len))


def _turn(run: Callable[[], Any], steps: int) -> tuple[float, float]:
    """(seconds of a step, cores in use)."""
    began, worked = time.perf_counter(), time.process_time()
    for _ in range(steps):
        metrics = run()
    jax.block_until_ready(metrics)
    seconds = time.perf_counter() - began
    return seconds / steps, (time.process_time() - worked) / seconds
