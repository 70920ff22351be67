"""From options and shapes to one optax transformation, with what the train step and the logs want to know about it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax

from lm.core.tables import Table
from lm.core.tree import map_named
from lm.optim.held import on_free
from lm.optim.muon import scale_by_muon
from lm.optim.options import OptimizerOptions
from lm.optim.per_layer import per_layer
from lm.optim.rules import Row, table
from lm.optim.scalars import Scalars
from lm.optim.schedules import make_schedule
from lm.optim.sparse.resolve import beside_tables, sparse_tables
from lm.optim.sparse.tables import SparseTables
from lm.optim.storage import store_in_bfloat16
from lm.optim.trainable import on_trainable


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """tx: gradients of all or of the trainable parameters to updates of all (`update` needs the parameters); where
    there are `tables`, of all but these, and without clipping, which needs the gradients of both. schedule: step to
    learning rate, before per-parameter multipliers. rows: what is done to each parameter. trainable_mask: tree of bool
    like the parameters, for `lm.optim.trainable.select`."""

    tx: optax.GradientTransformation
    schedule: optax.Schedule
    rows: tuple[Row, ...]
    trainable_mask: Any
    options: OptimizerOptions
    tables: SparseTables | None = None


def build_optimizer(options: OptimizerOptions, params_shapes: Any, total_steps: int,
                    tables: Mapping[str, Table] | None = None, *, scalars: Scalars | None = None) -> Optimizer:
    """The optimizer of these variables ({"params": ...}, with {"lora": ...} beside it where there are adapters).

    In order: gradients of trainable parameters, clipped by their global norm; each parameter's direction by its
    optimizer; plus weight decay times the parameter; times the parameter's multiplier and minus the learning rate.

    Args:
      params_shapes: arrays or `jax.ShapeDtypeStruct`s; only names and shapes are read.
      total_steps: length of the schedule.
      tables: by parameter, the tables of the model; used with `options.sparse_tables`.
      scalars: numbers, which may be traced, in place of those of the options. What is left out where a number is 0 or 1
        is as the options say.

    Raises ValueError for options that do not fit together, a rule that matches nothing, or a schedule too long.
    """
    options.check()
    rows = table(options, params_shapes)
    names = [row.name for row in rows]
    given = scalars or Scalars(options.learning_rate, *zip(*((row.weight_decay, row.lr_multiplier) for row in rows),
                                                           strict=True))
    decay, multiplier = dict(zip(names, given.weight_decay, strict=True)), dict(zip(names, given.lr_multiplier,
                                                                                    strict=True))
    schedule = make_schedule(dataclasses.replace(options, learning_rate=given.learning_rate), total_steps)
    by_name = {row.name: row for row in rows}
    mask = map_named(lambda name, _: not by_name[name].frozen, params_shapes)
    sparse = sparse_tables(options, by_name, tables or {}) if options.sparse_tables else None
    rows = tuple(by_name[row.name] for row in rows)
    by_rows = sparse.tables if sparse else {}
    trainable = [row for row in rows if not row.frozen and row.name not in by_rows]
    densely = map_named(lambda name, keep: keep and name not in by_rows, mask)

    steps = []
    if options.clip_norm is not None and not sparse:
        steps.append(optax.clip_by_global_norm(options.clip_norm))
    groups = {_group(row): row for row in trainable}
    steps.append(optax.partition({group: _direction(options, row) for group, row in groups.items()},
                                 lambda tree: map_named(lambda name, _: _group(by_name[name]), tree)))
    if any(row.weight_decay for row in trainable):
        steps.append(optax.stateless(lambda updates, params: map_named(
            lambda name, u, p: u + decay[name] * p if by_name[name].weight_decay else u,
            updates, params)))
    if any(row.lr_multiplier != 1 for row in trainable):
        steps.append(optax.stateless(lambda updates, _: map_named(
            lambda name, u: u * multiplier[name], updates)))
    tx = optax.chain(*steps, optax.scale_by_learning_rate(schedule))
    if options.state_dtype == "bfloat16":
        tx = store_in_bfloat16(tx, stochastic=options.stochastic_rounding)
    held = {row.name: row.held for row in trainable if row.held}
    tx = on_free(on_trainable(tx, densely), held)
    if sparse:
        tx = beside_tables(tx, sparse)
    return Optimizer(tx, schedule, rows, mask, options, sparse)


def _group(row: Row) -> str:
    """Parameters of one group share one transformation and its state. Only adafactor looks at a whole parameter
    without being told which axes are a matrix, so its stacked layers are mapped over, one group a depth."""
    return f"adafactor_{row.layers}_layers" if row.optimizer == "adafactor" and row.layers else row.optimizer


def _direction(options: OptimizerOptions, row: Row) -> optax.GradientTransformation:
    """The optimizer of this row's group without weight decay and learning rate."""
    b1 = 0.9 if options.b1 is None else options.b1
    momentum, nesterov = options.momentum, options.nesterov
    if row.optimizer == "adamw":
        return optax.scale_by_adam(b1, 0.95 if options.b2 is None else options.b2, options.eps)
    if row.optimizer == "lion":
        return optax.scale_by_lion(b1, 0.99 if options.b2 is None else options.b2)
    if row.optimizer == "sgd":
        momentum = 0.9 if momentum is None else momentum
        return optax.trace(momentum, bool(nesterov)) if momentum else optax.identity()
    if row.optimizer == "muon":
        return scale_by_muon(0.95 if momentum is None else momentum, nesterov=nesterov is not False,
                             steps=options.muon_steps, consistent_rms=options.muon_consistent_rms,
                             form=options.muon_newton_schulz)
    return per_layer(_adafactor(options)) if row.layers else _adafactor(options)


def _adafactor(options: OptimizerOptions) -> optax.GradientTransformation:
    """optax.adafactor up to the learning rate, which comes last here as everywhere."""
    steps = [optax.scale_by_factored_rms(decay_rate=options.adafactor_decay_rate,
                                         min_dim_size_to_factor=options.adafactor_min_dim)]
    if options.adafactor_clip_rms is not None:
        steps.append(optax.clip_by_block_rms(options.adafactor_clip_rms))
    if options.adafactor_parameter_scale:
        steps.append(optax.scale_by_param_block_rms())
    if options.momentum:
        steps.append(optax.ema(options.momentum, debias=False))
    return optax.chain(*steps)
