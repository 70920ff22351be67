"""The train loop, read from top to bottom: restore, then step, log, evaluate and save until done or told to stop."""

import collections
import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from lm.core.batch import Batch
from lm.core.types import Apply, Objective, Params
from lm.core.whole_file import write_text
from lm.train.checkpoint import Checkpoints, open_checkpoints
from lm.train.exit_codes import DONE, NONFINITE, PREEMPTED
from lm.train.expert_plot import plot_experts
from lm.train.feed import data_shard, feed, to_device
from lm.train.metrics import PerfMeter
from lm.train.one_at_a_time import OneAtATime
from lm.train.options import CheckpointOptions, LogOptions, TrainOptions
from lm.train.plots import plot_loss
from lm.train.profiling import Profiler
from lm.train.progress import Progress
from lm.train.rollback import roll_back
from lm.train.signals import Preemption
from lm.train.state import Recipe, TrainState
from lm.train.step import make_train_step
from lm.train.stragglers import Stragglers
from lm.train.unscored import Tell, Unscored
from lm.train.watchdog import Watchdog
from lm.train.writers import MetricsWriter, read_rows

IN_FLIGHT = 2  # steps dispatched ahead of the newest finished one: enough to hide the host, few enough to stop soon

RESULT = "final_result.json"

Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that the loop runs, and nothing about how it was configured.

    apply, objective, recipe: the model, what is minimised, how a state is made.
    batches(start_step, index, count): (step, rows of this process) from start_step on, without end.
    batch_at(step, index, count): the same rows at random, to dump one that went wrong.
    evaluate(params, step, note): metrics by name; prints what is to be read through `note`.
    data: what identifies the data; it is saved in every checkpoint, and a run goes on only with equal data.
    flops_per_token: forward FLOPs. passes: a step costs this many forward passes, see `lm.train.metrics.mfu`.
    bytes_per_token: mean UTF-8 bytes of a target, None where unknown.
    baselines: name to bits per byte, drawn beside the curve.
    base: what `lm.train.base` notes of the run that a fresh state's frozen parameters are read from; None saves all.
    unscored: told of each step's groups of rows whose scores are not finite, see `lm.train.unscored`.
    mask: takes targets out of a training batch, see `lm.train.step.make_train_step`.
    """

    apply: Apply
    objective: Objective
    recipe: Recipe
    batches: Callable[[int, int, int], Iterable[tuple[int, Batch]]]
    batch_at: Callable[[int, int, int], Batch]
    evaluate: Callable[[Params, int, Note], Mapping[str, float]]
    data: Mapping[str, Any]
    flops_per_token: float | None = None
    passes: float = 3.0
    bytes_per_token: float | None = None
    baselines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    base: Callable[[], Mapping[str, Any] | None] = lambda: None
    mask: Callable[[Batch, Any], Batch] | None = None
    unscored: Tell | None = None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When the loop does what, in steps. evaluate: between evaluations, None for never. final: evaluate at the end."""

    evaluate: int | None
    final: bool = True


def train(experiment: Experiment, workdir: epath.PathLike, mesh: Mesh, *, options: TrainOptions,
          checkpoint: CheckpointOptions, log: LogOptions, schedule: Schedule, profile: str | None = None,
          start: Callable[[TrainState], TrainState] | None = None, begun: Callable[[], None] = lambda: None) -> int:
    """Trains up to `options.steps`, from the newest checkpoint of `workdir` where there is one.

    start: changes a fresh state, e.g. to another run's parameters; not called when resuming. begun: called when the
    state is there, before anything is written: what does not fit the workdir's checkpoints has been refused by then, so
    that nobody writes a config beside checkpoints of another. Call under `jax.set_mesh(mesh)`. Returns a code of
    `lm.train.exit_codes`.
    """
    workdir = epath.Path(workdir)
    index, count = data_shard(mesh, options.batch_size, options.seq_len)
    first_process = jax.process_index() == 0
    step_fn = OneAtATime(jax.jit(
        make_train_step(experiment.apply, experiment.objective, experiment.recipe.optimizer,
                        microbatches=options.microbatches, skip_nonfinite=options.on_nonfinite == "skip",
                        spike_sigma=options.spike_sigma, per_microbatch=options.per_microbatch, mask=experiment.mask),
        donate_argnums=0, out_shardings=(experiment.recipe.shardings(mesh), None)))

    with open_checkpoints(workdir, checkpoint) as checkpoints:
        # --- Restore, or start.
        state, begin, base = restore_or_create(experiment, checkpoints, mesh, options, start)
        noted = {"data": dict(experiment.data), **({} if base is None else {"base": dict(base)})}
        begun()
        meter = PerfMeter(options.batch_size * options.seq_len, experiment.flops_per_token, mesh.devices.flat,
                          passes=experiment.passes)
        if begin >= options.steps:
            if first_process:
                finish_again(workdir, begin, meter.flops(begin), experiment.baselines)
                print(f"This run is complete: {workdir} holds step {begin} of {options.steps}. Raise train.steps to go "
                      f"on, or name another workdir.", flush=True)
            return DONE

        code, metrics, evaluated = DONE, {}, {}
        skipped, stragglers = None if begin else 0.0, Stragglers()
        unscored = Unscored(experiment.unscored)
        with (MetricsWriter(workdir, log, process_index=jax.process_index(), start_step=begin) as writer,
              Progress(options.steps, begin, log.every, quiet=not first_process) as progress,
              Profiler(profile, workdir, total_steps=options.steps) as profiler,
              Preemption(log.every) as preemption,
              Watchdog(options.hang_seconds, workdir, process_index=jax.process_index()) as watchdog):

            def evaluate(step: int) -> dict[str, float]:
                with meter.paused(metrics), watchdog.paused():
                    params = state.params if state.ema is None else state.ema
                    if hasattr(experiment.objective, "evaluated"):
                        params = experiment.objective.evaluated(params, state.carry)
                    found = dict(experiment.evaluate(params, step, progress.note))
                    writer.write(step, found)
                    return found

            def save(step: int) -> None:
                with meter.paused(metrics), watchdog.paused():
                    writer.flush()  # no checkpoint is newer than its rows
                    checkpoints.save(step, state, {**noted, "step": step}, evaluated)

            put = lambda batch: to_device(batch, mesh, index, count)
            batches = feed(experiment.batches(begin, index, count), put)
            in_flight: collections.deque[tuple[int, Any]] = collections.deque()
            profiler.at(begin)
            for step in range(begin + 1, options.steps + 1):
                # --- Step.
                with meter.waiting(metrics):
                    at, batch = next(batches)
                assert at == step - 1, f"the data gave batch {at} for step {step}"
                with profiler.step(step):
                    state, metrics = step_fn(state, batch)
                unscored.took(step, metrics)
                meter.stepped(metrics)
                profiler.at(step, metrics)
                in_flight.append((step, metrics["train/loss"]))
                if len(in_flight) > IN_FLIGHT:
                    finished, value = in_flight.popleft()
                    jax.block_until_ready(value)
                    unscored.finished(finished)
                    watchdog.finished(finished)

                # --- Log.
                stopping = preemption.agreed(step)
                due = {name: every is not None and step % every == 0 for name, every in (
                    ("log", log.every), ("evaluate", schedule.evaluate), ("save", checkpoint.every))}
                last = step == options.steps
                if any(due.values()) or last or stopping:
                    row = scalars(metrics, experiment.bytes_per_token)
                    unscored.finished(step)
                    ending = nonfinite(row, options)
                    if ending and options.after_max_skips == "rollback" and row["train/bad_step"] < 0:
                        if last or any(due.values()):  # a run that is not told to stop here comes to the same
                            state, abstract = None, experiment.recipe.abstract(mesh)  # its memory is needed now
                            with meter.paused(), watchdog.paused():
                                state = roll_back(checkpoints, abstract, row, step, options.max_rollbacks)
                        ending = state is None
                    if ending:
                        code = NONFINITE
                        report_nonfinite(experiment, workdir, row, step, index, count)
                        break
                    say_skipped(row, step, skipped, progress.note)
                    skipped = row["train/skipped"]
                    if due["log"] or last or stopping:
                        row |= meter.report()
                        with meter.paused():
                            for line in stragglers.look(meter.batch_time, row.get("perf/step_time")):
                                progress.note(f"step {step}: {line}")
                        writer.write(step, row)
                        progress.update(step, loss=row["train/loss"], bits_per_byte=row.get("train/bits_per_byte"),
                                        tokens_per_sec=row.get("perf/tokens_per_sec"), mfu=row.get("perf/mfu"))

                # --- Evaluate and save.
                evaluated = {}
                if due["evaluate"] or (last and schedule.final):
                    evaluated = evaluate(step)
                # What a run goes back to is from before the updates that it leaves out.
                good = options.after_max_skips == "stop" or not due["save"] or row["train/skips"] == 0
                if (due["save"] and good) or last or stopping:
                    save(step)
                if stopping and not last:
                    code = PREEMPTED
                    progress.note(f"Stopped after step {step}; the same command goes on from there.")
                    break
            batches.close()
            checkpoints.wait()
            if first_process:
                finish(workdir, step, code, {**scalars(metrics, experiment.bytes_per_token), **meter.summary(),
                                             "train/flops": meter.flops(step), **evaluated}, experiment.baselines)
    return code


def restore_or_create(experiment: Experiment, checkpoints: Checkpoints, mesh: Mesh, options: TrainOptions,
                      start: Callable[[TrainState], TrainState] | None
                      ) -> tuple[TrainState, int, Mapping[str, Any] | None]:
    """(state, steps done, base): the newest checkpoint, else a fresh state. Raises ValueError where the data are not
    those that the checkpoint was trained on."""
    if checkpoints.latest is None:
        state = experiment.recipe.create(options.seed, mesh)
        return (state if start is None else start(state)), 0, experiment.base()
    state, meta = checkpoints.restore(experiment.recipe.abstract(mesh))
    if meta["data"] != json.loads(json.dumps(dict(experiment.data))):
        raise ValueError(f"the data changed since this run was started: it was {meta['data']} and is now "
                         f"{dict(experiment.data)}. Bring the data back, or start in another workdir (--init-from "
                         f"takes the parameters along)")
    logging.info("restored step %d", meta["step"])
    return state, int(meta["step"]), meta.get("base")


def scalars(metrics: Mapping[str, Any], bytes_per_token: float | None) -> dict[str, float]:
    """The step's metrics on the host; bits per byte by the mean bytes of a target of the corpus."""
    row = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
    if bytes_per_token and "train/next_token" in row:
        row["train/bits_per_byte"] = row["train/next_token"] / math.log(2) / bytes_per_token
    return row


def nonfinite(row: Mapping[str, float], options: TrainOptions) -> bool:
    """Whether this cannot go on: a bad step, or too many updates in a row that were left out."""
    return row["train/bad_step"] >= 0 or row["train/skips"] > options.max_skips


def say_skipped(row: Mapping[str, float], step: int, before: float | None, note: Note) -> None:
    """A line where updates were left out since the last row."""
    new = 0 if before is None else int(row["train/skipped"] - before)
    if new > 0:
        note(f"step {step}: {new} update(s) left out since the last row, {int(row['train/skipped'])} in all"
             + (f", {int(row['train/spikes'])} of them spikes" if "train/spikes" in row else ""))


def report_nonfinite(experiment: Experiment, workdir: epath.Path, row: Mapping[str, float], step: int, index: int,
                     count: int) -> None:
    """Says what ended the run after `step` steps, and writes the batch of the bad step beside the metrics.

    The parameters were left as they were before that step; no checkpoint is written.
    """
    bad = int(row["train/bad_step"]) if row["train/bad_step"] >= 0 else step - 1
    what = f"Loss or gradient of step {bad + 1} is not finite"
    if row["train/bad_step"] < 0:
        what = f"{int(row['train/skips'])} updates in a row were left out, up to step {bad + 1} (train.max_skips)"
    batch = experiment.batch_at(bad, index, count)
    path = workdir / f"nonfinite_step{bad + 1}_rows{index}.npz"
    with path.open("wb") as file:
        np.savez(file, **batch._asdict())
    rows = len(batch.tokens)
    first = bad * rows * count + index * rows
    logging.error("%s. Its batch (global rows %d to %d) is in %s. Training stopped; the last checkpoint is from "
                  "before. Lower the learning rate, set optimizer.clip_norm, or leave such updates out: "
                  "train.on_nonfinite='skip', train.spike_sigma.", what, first, first + rows - 1, path)


def finish(workdir: epath.Path, step: int, code: int, result: Mapping[str, float | None],
           baselines: Mapping[str, float]) -> None:
    """Draws the plots and writes final_result.json, which comes last: where it is, the run has ended."""
    plot_loss(workdir, baselines=baselines)
    plot_experts(workdir)
    values = {name: value if value is None or math.isfinite(value) else str(value) for name, value in result.items()}
    write_text(workdir / RESULT, json.dumps({"step": step, "exit_code": code, **values,
                                             **{f"baseline/{n}": v for n, v in baselines.items()}}, indent=2) + "\n")


def finish_again(workdir: epath.Path, step: int, flops: float | None, baselines: Mapping[str, float]) -> None:
    """The same for a run that was killed between its last checkpoint and its end, from the rows of its last step;
    nothing where it came to its end."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        result = json.loads((workdir / RESULT).read_text())
        if result["step"] == step and result["exit_code"] == DONE:
            return
    values = {name: value for row in read_rows(workdir) if row["step"] == step for name, value in row.items()}
    finish(workdir, step, DONE, {**values, "train/flops": flops}, baselines)
