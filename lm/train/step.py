"""The train step: one pure function from (state, batch) to (state, metrics).

Accumulation is exact: every term is divided by its count over the whole batch, so that microbatches, padding and masks
change the gradient by rounding only.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.core.batch import Batch
from lm.core.sharding import constrain
from lm.core.tables import SINKS
from lm.core.tally import by_layer, settle
from lm.core.tree import STATS, named_leaves
from lm.core.types import UNSCORED, Apply, Array, Carry, Key, Mean, Objective, Params
from lm.losses.base import weight_at
from lm.optim.builder import Optimizer
from lm.optim.ema import ema_update
from lm.optim.trainable import restore, select
from lm.train.guard import is_spike, noted
from lm.train.state import TrainState
from lm.train.unscored import COUNT, leaving_out


def make_train_step(apply: Apply, objective: Objective, optimizer: Optimizer, *, microbatches: int = 1,
                    skip_nonfinite: bool = False, spike_sigma: float | None = None, per_microbatch: bool = False,
                    mask: Callable[[Batch, Array], Batch] | None = None
                    ) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The function that a run jits, with its state donated.

    A step whose loss or gradient is not finite changes nothing but `bad_step` (or, with skip_nonfinite, the count of
    skips and the step). With spike_sigma, neither does one that the state's guard takes for a spike (`lm.train.guard`):
    it counts as skipped. Groups of rows whose scores are not finite (`lm.train.unscored`) make a step such a one; with
    skip_nonfinite, where others remain, they are left out of loss and gradient as if the batch did not hold them.
    Metrics are scalars, keyed `train/...`, but for the marks of such groups, [B, G], under UNSCORED. What layers
    counted (`metrics["tally"]`) is settled once, from the whole batch: running statistics move on with the parameters,
    and there are metrics of each layer, `train/layer_<depth>/...`. mask: called with the whole batch and the step
    (int32, from 0), changes its weights.

    Raises ValueError for terms that do not add up over microbatches, unless per_microbatch.
    """
    if microbatches > 1 and objective.not_additive and not per_microbatch:
        raise ValueError(
            f"{', '.join(objective.not_additive)} does not add up over microbatches: use train.microbatches=1, or "
            f"train.per_microbatch=True to compute it in each microbatch alone")

    tables = optimizer.tables

    def gradient(trainable, sinks, frozen, by, carry, batch, counts, step, key):
        def loss(trainable, sinks):
            params, run = restore(trainable, frozen, by), apply
            if tables is not None:
                params, run = {**params, SINKS: sinks}, once(apply)
            means, after, metrics = objective(run, params, carry, batch, key)
            total = sum(weight_at(objective.weights[name], step) * mean.total / jnp.where(counts[name] == 0, 1,
                                                                                         counts[name])
                        for name, mean in means.items())
            return total, (means, after, metrics)
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(trainable, sinks)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        step_key = jax.random.fold_in(state.key, state.step)
        batch = batch if mask is None else mask(batch, state.step)
        sinks, by = {}, optimizer.trainable_mask
        if tables is not None:
            sinks, by = tables.open(state.params, by, batch.tokens.shape, microbatches)
        trainable = select(state.params, by)

        def run(batch: Batch) -> Any:
            counts = objective.counts(batch)
            return accumulate(
                lambda carry, part, key: gradient(trainable, sinks, state.params, by, carry, part, counts, state.step,
                                                  key),
                state.carry, batch, step_key, microbatches, carry_per_row=objective.carry_per_row)

        leave_out = skip_nonfinite and hasattr(objective, "without")
        found, marked = leaving_out(run, objective.without, batch, state.carry) if leave_out else (run(batch), None)
        loss, (grads, into_sinks), (means, carry, metrics) = found
        unscored = metrics.get(UNSCORED)
        marked = unscored if marked is None else marked

        tally = metrics.get("tally", {})
        # Under adapters the model itself stays as it is, and so do its statistics. A memory's start is no part of it.
        own = named_leaves({"params": optimizer.trainable_mask["params"]})
        learns = bool(tally) and any(on for name, on in own.items() if not name.startswith("memory/"))
        stats, counted = settle(state.params.get(STATS, {}), tally) if tally else ({}, {})
        metrics = {name: mean for name, mean in metrics.items() if name not in ("tally", UNSCORED)}
        before, opt_before = state.params, state.opt_state
        if tables is None:
            grad_norm = optax.tree.norm(grads)
        else:
            of_tables, squares = tables.collect(grads, into_sinks)
            grads = tables.without(grads)
            grad_norm = jnp.sqrt(optax.tree.norm(grads, squared=True) + squares)
            most = optimizer.options.clip_norm
            scale = jnp.float32(1) if most is None else most / jnp.maximum(grad_norm, most)
            grads = jax.tree.map(lambda g: g * scale, grads)
            before, opt_before = tables.without(before), opt_before._replace(tables=None)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if unscored is not None:  # a loss may be finite all the same: that of a rejected response that cannot be
            finite &= ~unscored.any()
        guard, spike, taken = state.guard, False, finite
        if guard is not None:
            values = jnp.stack([loss, grad_norm]).astype(jnp.float32)
            if spike_sigma is not None:
                spike = finite & is_spike(guard, values, spike_sigma)
                taken = finite & ~spike
        ok = taken & (state.bad_step < 0)
        guard = None if guard is None else noted(guard, values, ok, spike)

        def update(grads, carry):
            updates, opt_state = optimizer.tx.update(grads, opt_before, before)
            params = optax.apply_updates(before, updates)
            ema = state.ema
            if ema is not None:
                ema = ema_update(ema, params, optimizer.options.ema_decay, state.step)
            if stats and learns:  # averages already: the average of the parameters goes with the newest
                params = {**params, STATS: stats}
                ema = None if ema is None else {**ema, STATS: stats}
            return params, opt_state, carry, ema

        params, opt_state, carry, ema = jax.lax.cond(
            ok, update, lambda grads, carry: (before, opt_before, state.carry, state.ema), grads, carry)
        rate = optimizer.schedule(state.step - state.skipped)  # the optimizer counts updates, not steps
        if tables is not None:  # outside of the branches, so that their memory is changed in place
            params, of_rows = tables.update(params, state.params, state.opt_state.tables, of_tables, scale=scale,
                                            rate=rate, ok=ok)
            opt_state = opt_state._replace(tables=of_rows)
        bad = jnp.where((state.bad_step < 0) & ~finite, state.step, state.bad_step)
        after = TrainState(
            step=state.step + 1, params=params, opt_state=opt_state, carry=carry, ema=ema, key=state.key,
            bad_step=state.bad_step if skip_nonfinite else bad, skips=jnp.where(taken, 0, state.skips + 1),
            skipped=state.skipped + jnp.where(taken, 0, 1),
            guard=guard)
        report = {
            "train/loss": loss, "train/grad_norm": grad_norm,
            "train/lr": rate,
            "train/tokens": jnp.sum(batch.present, dtype=jnp.float32), "train/skips": after.skips,
            "train/skipped": after.skipped,
            "train/bad_step": after.bad_step,
            **({} if after.guard is None else {f"train/{name}": getattr(after.guard, name)
                                               for name in ("spikes", "rollbacks", "back_to")}),
            **{f"train/{name}": mean.value for name, mean in {**means, **metrics}.items()},
            **{f"train/{name}": value
               for name, value in by_layer(counted, named_leaves(state.params)).items()},
            **({} if marked is None else {COUNT: jnp.sum(marked, dtype=jnp.float32), UNSCORED: marked}),
        }
        return after, report

    return train_step


def accumulate(gradient: Callable[[Carry, Batch, Key], Any], carry: Carry, batch: Batch, key: Key, microbatches: int, *,
               carry_per_row: bool = False
               ) -> tuple[Array, Params, tuple[Mapping[str, Mean], Carry, Mapping[str, Mean]]]:
    """(loss, (gradient, sinks), (means, carry, metrics)) of a batch, in one piece or summed over microbatches in order;
    what came out of sinks is not summed, but stacked on a leading axis of microbatches, and metrics[UNSCORED] has the
    rows of the batch.

    Microbatch m takes rows m, m + M, m + 2M, ...: each device gives the same share of its own rows to every one.
    carry_per_row: every leaf of the carry is [M, ...], and microbatch m has the m-th; else they hand on one carry.
    """
    def cut(leaf):
        leaf = leaf.reshape(leaf.shape[0] // microbatches, microbatches, *leaf.shape[1:]).swapaxes(0, 1)
        return constrain(leaf, None, "batch", "length")

    first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
    if microbatches == 1:
        (loss, (means, after, metrics)), (grads, sinks) = gradient(first(carry) if carry_per_row else carry, batch, key)
        alone = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)
        return loss, (grads, alone(sinks)), (means, alone(after) if carry_per_row else after, metrics)

    parts = jax.tree.map(cut, batch)
    shared, own = (None, carry) if carry_per_row else (carry, None)
    rows_apart = lambda metrics: ({name: value for name, value in metrics.items() if name != UNSCORED},
                                  {name: value for name, value in metrics.items() if name == UNSCORED})
    shapes = jax.eval_shape(gradient, first(own) if carry_per_row else shared, first(parts), key)
    (loss, (means, _, metrics)), (grads, _) = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    metrics, _ = rows_apart(metrics)

    def body(sums, inputs):
        loss, grads, means, metrics, shared = sums
        index, part, own = inputs
        given = own if carry_per_row else shared
        (l, (m, after, r)), (g, sinks) = gradient(given, part, jax.random.fold_in(key, index))
        shared, own = (None, after) if carry_per_row else (after, None)
        r, rows = rows_apart(r)
        return (loss + l, *jax.tree.map(jnp.add, (grads, means, metrics), (g, m, r)), shared), (own, sinks, rows)

    (loss, grads, means, metrics, shared), (own, sinks, rows) = jax.lax.scan(
        body, (loss, grads, means, metrics, shared), (jnp.arange(microbatches), parts, own))
    rows = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]), rows)
    metrics = {**metrics, **rows}
    return loss, (grads, sinks), (means, own if carry_per_row else shared, metrics)


def once(apply: Apply) -> Apply:
    """`apply` that raises ValueError when it is called again with sinks: each takes the gradient of one pass."""
    passes = []

    def counted(params, *args, **kwargs):
        if SINKS in params:
            passes.append(params)
        if len(passes) > 1:
            raise ValueError("config.optimizer.sparse_tables takes the gradient of one pass of the model a step, and "
                             "this objective makes several; set config.optimizer.sparse_tables=None")
        return apply(params, *args, **kwargs)

    return counted
