"""What a table of N rows costs a train step that uses few of them: its rows updated alone, and all of them densely.

Times are taken in turns with those of a small table of REFERENCE rows, in one process: other work on the machine slows
both down, and what is reported as growth is the ratio.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.batch import Batch
from lm.core.types import Array
from lm.models.build import abstract_params, build_model, init_params, make_apply
from lm.models.tables import tables_of
from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions
from lm.optim.sparse.directions import row_direction
from lm.optim.sparse.row_wise import Rows, row_wise
from lm.tasks.build import build_objective
from lm.train.state import Recipe
from lm.train.step import make_train_step
from pallas_kernels.peer_experts import num_touched, peer_experts_with_sink

REFERENCE = 128**2
VOCAB = 64
ROUNDS = 15       # of each, in turns; medians count
DENSE_SHARE = 3   # of the dense step, which takes a second with a million rows, one round in so many


def table_cost(config: Any, rounds: int = ROUNDS) -> dict[str, float]:
    """Of a model with one block `peer`, with the config's N and with REFERENCE:

      rows: gather, scatter and optimizer alone, for ids drawn at random. layer: forward and backward of everything, and
      the row-wise update, without what is counted of the experts for the metrics. step: the whole train step. dense:
      the whole train step with dense gradient and optimizer.

    Of each `<name>_seconds` (median) and `<name>_growth` (median ratio of a turn to the reference's). `table_bytes`,
    and of the compiled steps `step_temporary_bytes`, `dense_temporary_bytes`; `gradient_rows`.
    """
    num_rows = config.model.peer.num_experts
    made = {n: _Table(config, n) for n in (num_rows, REFERENCE)}
    values = {"table_bytes": made[num_rows].table_bytes, "gradient_rows": made[num_rows].gradient_rows}
    for name in ("rows", "layer", "step", "dense"):
        runs = {n: getattr(table, name)() for n, table in made.items()}
        if name in ("step", "dense"):
            values[f"{name}_temporary_bytes"] = runs[num_rows][1]
        turns = max(1, rounds // DENSE_SHARE) if name == "dense" else rounds
        seconds = _in_turns([runs[n][0] for n in (num_rows, REFERENCE)], turns)
        values[f"{name}_seconds"] = statistics.median(seconds[0])
        values[f"{name}_growth"] = statistics.median(a / b for a, b in zip(*seconds, strict=True))
        del runs
    return values


def _in_turns(runs: list[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each, two warm-up rounds left out."""
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 2):
        for run, found in zip(runs, seconds, strict=True):
            begin = time.perf_counter()
            run()
            if turn > 1:
                found.append(time.perf_counter() - begin)
    return seconds


class _Table:
    """One size. Its methods give (a call that is waited for, bytes of temporaries)."""

    def __init__(self, config: Any, num_rows: int):
        self.seed, shape = config.train.seed, (config.train.batch_size, config.train.seq_len)
        model = config.model.to_dict()
        self.model = build_model({**model, "peer": {**model["peer"], "num_experts": num_rows}}, VOCAB)
        self.options = OptimizerOptions(**config.optimizer.to_dict())
        (self.name, table), = tables_of(self.model).items()
        self.shape = (num_rows, 2, self.model.embed_dim)
        self.choices = (*shape, table.num_heads, table.top_k)
        self.table_bytes = 4 * int(np.prod(self.shape))
        self.gradient_rows = num_touched(int(np.prod(self.choices)), num_rows)
        tokens = np.random.default_rng(self.seed).integers(0, VOCAB, (shape[0], shape[1] + 1)).astype(np.int32)
        self.batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones(shape, np.float32), np.ones(shape, np.int32),
                           np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape))

    def recipe(self, sparse: bool) -> Recipe:
        options = self.options if sparse else dataclasses.replace(self.options, sparse_tables=None)
        shapes = jax.eval_shape(lambda: init_params(self.model, jax.random.key(0)))
        optimizer = build_optimizer(options, shapes, 1000, tables_of(self.model))
        return Recipe(lambda key: init_params(self.model, key), abstract_params(self.model), optimizer)

    def step(self, sparse: bool = True) -> tuple[Callable[[], None], int]:
        recipe = self.recipe(sparse)
        run = jax.jit(make_train_step(make_apply(self.model), build_objective({}), recipe.optimizer), donate_argnums=0)
        return self._of_state(run, jax.jit(recipe.fresh)(self.seed), self.batch)

    def dense(self) -> tuple[Callable[[], None], int]:
        return self.step(sparse=False)

    def layer(self) -> tuple[Callable[[], None], int]:
        recipe, objective, apply = self.recipe(sparse=True), build_objective({}), make_apply(self.model)
        tables = recipe.optimizer.tables

        def run(state, batch):
            sinks, mask = tables.open(state.params, recipe.optimizer.trainable_mask, batch.tokens.shape, 1)
            rest = tables.without(state.params)

            def loss(rest, sinks):
                params = jax.tree.map(lambda keep, new, old: new if keep else old, mask, rest, state.params)
                means, *_ = objective(apply, {**params, "sinks": sinks}, (), batch, state.key)
                return sum(mean.value for mean in means.values())

            grads, sinks = jax.grad(loss, (0, 1))(rest, sinks)
            found, _ = tables.collect({}, jax.tree.map(lambda a: a[None], sinks))
            params, rows = tables.update(rest, state.params, state.opt_state.tables, found, scale=1.0, rate=1e-3,
                                         ok=True)
            return state._replace(params=params, opt_state=state.opt_state._replace(tables=rows)), grads

        return self._of_state(jax.jit(run, donate_argnums=0), jax.jit(recipe.fresh)(self.seed), self.batch)

    def rows(self) -> tuple[Callable[[], None], int]:
        wise = row_wise(row_direction(self.options))

        def run(state: tuple[Array, Any], x: Array, ids: Array, gates: Array) -> tuple[tuple[Array, Any], Any]:
            table, memory = state

            def loss(x, gates, sink):
                y, touched = peer_experts_with_sink(x, ids, gates, table, sink, activation=jax.nn.gelu)
                return jnp.sum(jnp.sin(y)), touched

            sink = jnp.zeros((self.gradient_rows, *self.shape[1:]))
            (dx, dgates, values), touched = jax.grad(loss, (0, 1, 2), has_aux=True)(x, gates, sink)
            rows = Rows(touched.ids, values)
            return wise.update_rows(table, memory, rows, 1.0, 1e-3, 0.0), (dx, dgates)

        def fresh(key: Array) -> tuple[Array, Any]:
            table = jax.random.normal(key, self.shape)
            return table, wise.init(table)

        draw = np.random.default_rng(self.seed)
        B, T, *_ = self.choices
        inputs = (draw.standard_normal((B, T, self.shape[-1])).astype(np.float32),
                  draw.integers(0, self.shape[0], self.choices).astype(np.int32),
                  draw.random(self.choices).astype(np.float32))
        return self._of_state(jax.jit(run, donate_argnums=0), jax.jit(fresh)(jax.random.key(self.seed)), *inputs)

    def _of_state(self, run: Callable, state: Any, *inputs: Any) -> tuple[Callable[[], None], int]:
        compiled = run.lower(state, *inputs).compile()
        held = [state]

        def call() -> None:
            state, _ = jax.block_until_ready(compiled(held.pop(), *inputs))
            held.append(state)

        return call, compiled.memory_analysis().temp_size_in_bytes
