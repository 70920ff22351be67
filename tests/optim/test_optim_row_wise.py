"""Optimizers of single rows against loops over rows in numpy, and against the dense ones where every row is touched."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.core.tables import Table
from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions
from lm.optim.sparse.directions import row_direction
from lm.optim.sparse.row_wise import Rows, merged, row_wise

N, ROW, STEPS = 9, (2, 3), 6
RATE, DECAY, SCALE = 0.1, 0.3, 0.5
OPTIONS = {"adamw": dict(b1=0.8, b2=0.9, eps=1e-3), "adagrad": dict(eps=1e-3), "sgd": dict(momentum=0.7)}


def steps(every):
    """[(ids, gradients)] of six steps; every: all rows in each, else some, among them none."""
    rng = np.random.default_rng(0)
    counts = [N] * STEPS if every else [4, 1, 0, 9, 5, 3]
    return [(np.sort(rng.permutation(N)[:count]), rng.normal(size=(count, *ROW))) for count in counts]


def by_hand(name, table, every):
    """Float64 loops over steps and rows; what a row remembers is its own, its count of steps included."""
    o, memory = OPTIONS[name], [dict(t=0, m=0.0, v=0.0) for _ in range(N)]
    for ids, gradients in steps(every):
        for i, g in zip(ids, SCALE * gradients, strict=True):
            row = memory[i]
            row["t"] += 1
            if name == "adamw":
                row["m"] = o["b1"] * row["m"] + (1 - o["b1"]) * g
                row["v"] = o["b2"] * row["v"] + (1 - o["b2"]) * g * g
                u = row["m"] / (1 - o["b1"]**row["t"]) / (np.sqrt(row["v"] / (1 - o["b2"]**row["t"])) + o["eps"])
            elif name == "adagrad":
                row["v"] = row["v"] + g * g
                u = g / np.sqrt(row["v"] + o["eps"]**2)
            else:
                row["m"] = o["momentum"] * row["m"] + g
                u = row["m"]
            table[i] -= RATE * (u + DECAY * table[i])
    return table


def start():
    return np.random.default_rng(1).normal(size=(N, *ROW))


def run(name, every, dense, slots=N):
    wise = row_wise(row_direction(OptimizerOptions(sparse_tables=name, **OPTIONS[name])))
    table = jnp.asarray(start(), jnp.float32)
    state = wise.init(table)
    update = jax.jit(wise.update_dense if dense else wise.update_rows, static_argnums=(6,) if dense else (5,))
    for ids, gradients in steps(every):
        if dense:
            values, touched = np.zeros((N, *ROW), np.float32), np.zeros(N, bool)
            values[ids], touched[ids] = gradients, True
            table, state = update(table, state, values, touched, SCALE, RATE, DECAY)
        else:
            padded = np.full(slots, N, np.int32), np.full((slots, *ROW), np.nan, np.float32)
            padded[0][:len(ids)], padded[1][:len(ids)] = ids, gradients
            table, state = update(table, state, Rows(*padded), SCALE, RATE, DECAY)
    return np.asarray(table)


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_follow_their_own_optimizers(name, monkeypatch):
    """In pieces of two rows, so that the last piece is shorter; slots without a row hold NaN and change nothing."""
    monkeypatch.setattr("lm.optim.sparse.row_wise.CHUNK_BYTES", 2 * 4 * 6)
    want = by_hand(name, start(), every=False)
    np.testing.assert_allclose(run(name, False, dense=False), want, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(run(name, False, dense=True), want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_equal_to_the_dense_optimizer_where_every_row_is_touched(name):
    table = {"params": {"table": jnp.asarray(start(), jnp.float32)}}
    if name == "adagrad":
        tx = optax.chain(optax.scale_by_rss(0.0, 1e-6), optax.add_decayed_weights(DECAY),
                         optax.scale_by_learning_rate(RATE))
    else:
        rule = {"match": "table", "weight_decay": DECAY}
        tx = build_optimizer(OptimizerOptions(name, learning_rate=RATE, schedule="constant", warmup_steps=0,
                                              clip_norm=None, rules=(rule,), **OPTIONS[name]), table, 100).tx
    state = tx.init(table)
    for _, gradients in steps(every=True):
        grads = {"params": {"table": jnp.asarray(SCALE * gradients, jnp.float32)}}
        updates, state = tx.update(grads, state, table)
        table = optax.apply_updates(table, updates)
    np.testing.assert_allclose(run(name, True, dense=False), table["params"]["table"], rtol=2e-5, atol=1e-6)


def test_untouched_rows_keep_every_bit():
    rows = {0, 3}
    wise = row_wise(row_direction(OptimizerOptions(sparse_tables="adamw")))
    table = jnp.asarray(start(), jnp.float32)
    state = jax.tree.map(lambda a: a + 1, wise.init(table))  # as after a step in which all were touched
    after = wise.update_rows(table, state, Rows(jnp.array([0, 3, N]), jnp.full((3, *ROW), 2.0)), 1.0, RATE, DECAY)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves((table, state)), strict=True):
        same = {i for i in range(N) if np.array_equal(new[i], old[i])}
        assert same == set(range(N)) - rows


def test_parts_are_merged_by_id():
    rng = np.random.default_rng(2)
    ids = np.array([[1, 4, 7, N], [0, 4, N, N], [2, 4, 7, 8]])
    values = rng.normal(size=(3, 4, *ROW)).astype(np.float32)
    got = jax.jit(merged, static_argnums=2)(jnp.asarray(ids), jnp.where(jnp.asarray(ids)[..., None, None] < N, values,
                                                                        0), N)
    want = np.zeros((N + 1, *ROW))
    np.add.at(want, ids.reshape(-1), values.reshape(-1, *ROW))
    np.testing.assert_array_equal(got.ids, [0, 1, 2, 4, 7, 8, N, N, N])
    np.testing.assert_allclose(got.values[:6], want[[0, 1, 2, 4, 7, 8]], rtol=1e-6)


@pytest.mark.parametrize(("options", "message"), [
    (dict(sparse_tables="adam"), "sparse_tables='adam' is unknown; did you mean 'adamw'"),
    (dict(sparse_tables="adamw", ema_decay=0.9), r"averages every row in every step; set one of them to None"),
    (dict(sparse_tables="adamw", state_dtype="bfloat16"), "keeps the state of rows in float32"),
    (dict(sparse_tables="adamw", rules=({"match": "table", "optimizer": "lion"},)), "gives table the optimizer 'lion'"),
    (dict(sparse_tables="adamw", rules=({"match": "table", "freeze": True},)), "no table to update: .* freeze table"),
    (dict(sparse_tables="adamw", rules=({"match": "table", "freeze_first": (1, -1)},)), "holds whole rows of table"),
])
def test_combinations_that_cannot_be_are_refused(options, message):
    params = {"params": {"table": np.zeros((N, *ROW)), "kernel": np.zeros((2, 2))}}
    tables = {"table": Table(N, 1, 2, ("experts", None, "embed"))}
    with pytest.raises(ValueError, match=message):
        build_optimizer(OptimizerOptions(**options), params, 10, tables)


def test_a_model_without_tables_is_refused():
    with pytest.raises(ValueError, match=r"no table to update: only layers of kind peer and pkm have one"):
        build_optimizer(OptimizerOptions(sparse_tables="sgd"), {"params": {"kernel": np.zeros((2, 2))}}, 10, {})
