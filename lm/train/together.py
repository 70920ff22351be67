"""The train loop of several runs in one program: each keeps its workdir, evaluations, checkpoints and end.

As `lm.train.loop`, but that a step is one of every run. Where a run ends (done, not finite, told to stop), the others
go on; its place in the program is computed in vain until half of the runs have ended, when a smaller one is made.
"""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.core.batch import Batch
from lm.train.checkpoint import open_checkpoints
from lm.train.exit_codes import DONE, NONFINITE, PREEMPTED
from lm.train.feed import data_shard, feed
from lm.train.group_step import make_group_step, stacked_scalars
from lm.train.loop import (
    IN_FLIGHT,
    Experiment,
    Schedule,
    finish,
    nonfinite,
    report_nonfinite,
    restore_or_create,
    scalars,
)
from lm.train.metrics import PerfMeter
from lm.train.options import CheckpointOptions, LogOptions, TrainOptions
from lm.train.places import Places
from lm.train.progress import Progress
from lm.train.signals import Preemption
from lm.train.state import TrainState
from lm.train.watchdog import Watchdog
from lm.train.writers import MetricsWriter


@dataclasses.dataclass(frozen=True)
class Member:
    """One of the runs; experiments, options and schedules are equal but for seed, learning rate, weight decay and the
    data's order. start, begun: as of `lm.train.loop.train`. told: where its progress is printed. wanted: asked at log
    steps and evaluations; a run that is no longer wanted is saved, and ends as if preempted."""

    experiment: Experiment
    workdir: epath.Path
    options: TrainOptions
    checkpoint: CheckpointOptions
    log: LogOptions
    schedule: Schedule
    told: TextIO
    start: Callable[[TrainState], TrainState] | None = None
    begun: Callable[[], None] = lambda: None
    wanted: Callable[[], bool] = lambda: True


class Run:
    """A member on its way. step: finished steps. code: how it ended, None before. state: None while it is one of the
    states of a program."""

    def __init__(self, member: Member, mesh: Mesh, opened: contextlib.ExitStack):
        self.member, experiment, options = member, member.experiment, member.options
        self.checkpoints = opened.enter_context(open_checkpoints(member.workdir, member.checkpoint))
        self.state, self.step, base = restore_or_create(experiment, self.checkpoints, mesh, options, member.start)
        self.noted = {"data": dict(experiment.data), **({} if base is None else {"base": dict(base)})}
        member.begun()
        self.code = DONE if self.step >= options.steps else None
        self.evaluated: dict[str, float] = {}
        if self.code is None:
            self.writer = opened.enter_context(MetricsWriter(member.workdir, member.log, start_step=self.step))
            self.progress = opened.enter_context(Progress(options.steps, self.step, member.log.every,
                                                          stream=member.told))

    def due(self) -> dict[str, bool]:
        """What the options want after this step."""
        every = {"log": self.member.log.every, "evaluate": self.member.schedule.evaluate,
                 "save": self.member.checkpoint.every}
        return {name: steps is not None and self.step % steps == 0 for name, steps in every.items()}

    def show(self, row: dict[str, Any]) -> None:
        """A row of metrics, to the file and to whoever watches."""
        self.writer.write(self.step, row)
        self.progress.update(self.step, loss=row["train/loss"], bits_per_byte=row.get("train/bits_per_byte"),
                             tokens_per_sec=row.get("perf/tokens_per_sec"), mfu=row.get("perf/mfu"))

    def evaluate(self, state: TrainState) -> None:
        """Evaluates, and writes what was found."""
        params = state.params if state.ema is None else state.ema
        objective = self.member.experiment.objective
        if hasattr(objective, "evaluated"):
            params = objective.evaluated(params, state.carry)
        self.evaluated = dict(self.member.experiment.evaluate(params, self.step, self.progress.note))
        self.writer.write(self.step, self.evaluated)

    def save(self, state: TrainState) -> None:
        """Begins to save."""
        self.writer.flush()  # no checkpoint is newer than its rows
        self.checkpoints.save(self.step, state, {**self.noted, "step": self.step}, self.evaluated)

    def end(self, code: int, row: dict[str, Any], meter: PerfMeter) -> None:
        """Notes how it ended."""
        self.code = code
        self.checkpoints.wait()
        finish(self.member.workdir, self.step, code, {**row, **meter.summary(), "train/flops": meter.flops(self.step),
                                                      **self.evaluated}, self.member.experiment.baselines)


def train_together(members: Sequence[Member], mesh: Mesh, devices: Sequence[Any] | None = None,
                   way: str = "vmap") -> list[int]:
    """Trains all members to their ends, from their newest checkpoints where there are any, and returns their codes of
    `lm.train.exit_codes`. Call under `jax.set_mesh(mesh)`, a mesh of one device, where runs are evaluated and saved.

    devices: over which the runs are spread, whole runs each; the mesh's where not given. way: see `make_group_step`.
    Raises ValueError for a mesh or members that cannot share a program.
    """
    if mesh.size != 1:
        raise ValueError(f"a run of a group has one device, and the mesh has {mesh.size}")
    devices = list(mesh.devices.flat) if devices is None else devices
    first = members[0]
    with contextlib.ExitStack() as opened:
        runs = [Run(member, mesh, opened) for member in members]
        preemption = opened.enter_context(Preemption(first.log.every))
        watchdog = opened.enter_context(Watchdog(first.options.hang_seconds, first.workdir))
        while going := [run for run in runs if run.code is None]:
            _advance(going, mesh, devices, way, preemption, watchdog)
    return [run.code for run in runs]


def _advance(runs: Sequence[Run], mesh: Mesh, devices: Sequence[Any], way: str, preemption: Preemption,
             watchdog: Watchdog) -> None:
    """Trains these runs in one program until half of them have ended, or all where there is one."""
    first = runs[0].member
    experiment, options = first.experiment, first.options
    shared = len({(json.dumps(dict(run.member.experiment.data)), run.step) for run in runs}) == 1
    places, home = Places(len(runs), devices), NamedSharding(mesh, PartitionSpec())
    step_fn = jax.jit(make_group_step(experiment.apply, experiment.objective, experiment.recipe, options,
                                      shared_batch=shared, way=way, mesh=places.mesh), donate_argnums=0)
    rates = jax.device_put(stacked_scalars(places.filled([run.member.experiment.recipe.optimizer for run in runs])),
                           places.split)
    states = places.put([run.state for run in runs])
    for run in runs:
        run.state = None
    meter = PerfMeter(options.batch_size * options.seq_len, experiment.flops_per_token, mesh.devices.flat,
                      passes=experiment.passes)
    index, count = data_shard(mesh, options.batch_size, options.seq_len)
    sources = [run.member.experiment.batches(run.step, index, count) for run in (runs[:1] if shared else runs)]
    batches = feed(rounds(sources, places), lambda batch: jax.device_put(
        batch, places.whole if shared else places.split))
    in_flight: collections.deque[Any] = collections.deque()
    metrics: dict[str, Any] = {}
    number = 0
    while sum(run.code is None for run in runs) > len(runs) // 2:
        # --- Step.
        with meter.waiting(metrics):
            _, batch = next(batches)
        with jax.set_mesh(places.mesh):
            states, metrics = step_fn(states, rates, batch)
        meter.stepped(metrics)
        number += 1
        in_flight.append(metrics["train/loss"])
        if len(in_flight) > IN_FLIGHT:
            jax.block_until_ready(in_flight.popleft())
            watchdog.finished(number - IN_FLIGHT)

        # --- Log, evaluate and save, run by run.
        stopping = preemption.agreed(number)
        found = speed = None
        for place, run in enumerate(runs):
            if run.code is not None:
                continue
            run.step += 1
            run.evaluated = {}
            due, last = run.due(), run.step == run.member.options.steps
            leaving = stopping or (any(due.values()) and not run.member.wanted())
            if not (any(due.values()) or last or leaving):
                continue
            found = jax.device_get(metrics) if found is None else found
            row = scalars({name: values[place] for name, values in found.items()},
                          run.member.experiment.bytes_per_token)
            if nonfinite(row, options):
                report_nonfinite(run.member.experiment, run.member.workdir, row, run.step, index, count)
                run.end(NONFINITE, row, meter)
                continue
            if due["log"] or last or leaving:
                speed = meter.report() if speed is None else speed
                row |= speed
                run.show(row)
            evaluate = due["evaluate"] or (last and run.member.schedule.final)
            if evaluate or due["save"] or last or leaving:
                with meter.paused(metrics), watchdog.paused():
                    state = places.take(states, place, home)
                    if evaluate:
                        run.evaluate(state)
                    if due["save"] or last or leaving:
                        run.save(state)
                    del state
            if leaving and not last:
                run.progress.note(f"Stopped after step {run.step}; the same command goes on from there.")
            if last or leaving:
                with watchdog.paused():
                    run.end(DONE if last else PREEMPTED, row, meter)
    batches.close()
    for place, run in enumerate(runs):
        if run.code is None:
            run.state = places.take(states, place, home)


def rounds(sources: Sequence[Iterable[tuple[int, Batch]]], places: Places) -> Iterator[tuple[int, Batch]]:
    """(step of the first, batch): one source as it is, several stacked, one for every place."""
    if len(sources) == 1:
        yield from sources[0]
        return
    for several in zip(*sources, strict=True):
        yield several[0][0], jax.tree.map(lambda *rows: np.stack(rows), *places.filled([b for _, b in several]))
