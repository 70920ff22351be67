"""Updates that are left out as spikes: which ones, against a loop in numpy; and what a run does after too many."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import ADAMW, MODEL, VOCAB, make_recipe, packed_batch
from tiny_experiment import get_config

from launch import config as configs
from launch.train import prepare
from lm.core.sharding import make_mesh
from lm.models.build import build_model, make_apply
from lm.tasks.build import build_objective
from lm.train.checkpoint import open_checkpoints, restore_params
from lm.train.guard import fresh_guard, is_spike, noted
from lm.train.loop import Schedule, train
from lm.train.options import CheckpointOptions, TrainOptions
from lm.train.step import make_train_step
from lm.train.writers import read_rows

SIGMA, WINDOW = 4.0, 8


def expected(values: np.ndarray) -> list[bool]:
    """Which of [N, 2] values are spikes."""
    seen, out = [], []
    for one in values.astype(np.float64):
        window = np.array(seen[-WINDOW:])
        spike = len(window) >= WINDOW // 2 and bool((one > window.mean(0) + SIGMA * window.std(0)).any())
        out.append(spike)
        if not spike and np.isfinite(one).all():
            seen.append(one)
    return out


@pytest.mark.parametrize("seed", range(3))
def test_spikes_are_those_of_the_formula(seed):
    rng = np.random.default_rng(seed)
    values = np.stack([3 + 0.1 * rng.normal(size=80), rng.gamma(5.0, size=80)], 1)
    values[rng.integers(4, 80, 12), rng.integers(0, 2, 12)] += 20  # some of them in a row
    values = values.astype(np.float32)

    @jax.jit
    def step(guard, one):
        spike = is_spike(guard, one, SIGMA)
        return noted(guard, one, ~spike, spike), spike

    guard, found = fresh_guard(WINDOW), []
    for one in values:
        guard, spike = step(guard, one)
        found.append(bool(spike))
    assert found == expected(values) and 5 < sum(found) < 30
    assert int(guard.spikes) == sum(found) and int(guard.taken) == 80 - sum(found)


def scrambled(batch, step):
    """Batches 9, 10 and 14 have targets that nothing could know."""
    bad = (step == 9) | (step == 10) | (step == 14)
    return batch._replace(targets=jnp.where(bad, VOCAB - 1, batch.targets))


def test_a_step_leaves_a_spike_out_and_counts_it():
    model = build_model(MODEL, VOCAB)
    recipe = dataclasses.replace(make_recipe(model, ADAMW), spike_window=WINDOW)
    state = recipe.create(0, make_mesh({"data": 1}, devices=jax.devices()[:1]))
    step = jax.jit(make_train_step(make_apply(model), build_objective({}), recipe.optimizer, spike_sigma=SIGMA,
                                   mask=scrambled))
    values, skips = [], []
    for n in range(18):
        before = [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state))]
        state, metrics = step(state, packed_batch(n % 3))
        values.append([float(metrics["train/loss"]), float(metrics["train/grad_norm"])])
        skips.append(int(metrics["train/skips"]))
        after = [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state))]
        same = all((a == b).all() for a, b in zip(before, after, strict=True))
        assert same == (skips[-1] > 0), n
    assert [s > 0 for s in skips] == expected(np.array(values))
    assert skips[9:11] == [1, 2] and skips[14] > 0
    assert int(metrics["train/spikes"]) == int(metrics["train/skipped"]) == sum(s > 0 for s in skips)
    assert int(metrics["train/bad_step"]) == -1 and int(state.step) == 18


def run(workdir: pathlib.Path, burst: range, **options) -> int:
    """The tiny experiment with losses that are not finite in the steps of `burst` (from 0)."""
    config = get_config()
    config.train.update(steps=24, **options)
    config.checkpoint.update(every=4, keep=9)
    config.eval.update(final=False)
    config = configs.resolve(config.to_dict())
    prepared = prepare(config)
    prepared = dataclasses.replace(prepared, mesh=make_mesh({"data": 1}, devices=jax.devices()[:1]))

    def mask(batch, step):
        bad = (step >= burst.start) & (step < burst.stop)
        return batch._replace(weights=jnp.where(bad, jnp.inf, batch.weights))

    experiment = dataclasses.replace(prepared.experiment(str(workdir)), mask=mask)
    with jax.set_mesh(prepared.mesh):
        return train(experiment, workdir, prepared.mesh, options=prepared.options,
                     checkpoint=configs.options(config, "checkpoint"), log=configs.options(config, "log"),
                     schedule=Schedule(None, False))


@pytest.mark.slow
def test_a_burst_goes_back_and_on_with_other_data(tmp_path):
    options = dict(on_nonfinite="skip", max_skips=2, after_max_skips="rollback")
    assert run(tmp_path / "a", range(10, 13), **options) == 0
    rows = {row["step"]: row for row in read_rows(tmp_path / "a")}
    assert sorted(rows) == list(range(1, 25))  # no step twice
    assert [rows[n]["train/skips"] for n in (10, 11, 12, 13, 14)] == [0, 1, 2, 3, 0]
    assert rows[13]["train/back_to"] == -1 and rows[14]["train/back_to"] == 8
    # 3 steps of the burst and the 2 updates since step 8; the schedule goes on with the updates that count.
    assert rows[24]["train/skipped"] == 5 and rows[24]["train/rollbacks"] == 1
    assert not (tmp_path / "a/checkpoints/12").exists()  # within the burst nothing is saved


@pytest.mark.slow
def test_a_run_without_a_checkpoint_or_with_too_many_rollbacks_stops(tmp_path):
    options = dict(on_nonfinite="skip", max_skips=1, after_max_skips="rollback")
    assert run(tmp_path / "early", range(1, 9), **options) == 76
    assert run(tmp_path / "long", range(13, 24), **options, max_rollbacks=2) == 76
    rows = {row["step"]: row for row in read_rows(tmp_path / "long")}
    assert rows[max(rows)]["train/back_to"] == 8  # first to 12, and then, with nothing saved since, further
    assert len(list((tmp_path / "long").glob("nonfinite_step*.npz"))) == 1
    assert max(restore_steps(tmp_path / "long")) == 12


def restore_steps(workdir):
    with open_checkpoints(workdir, CheckpointOptions()) as checkpoints:
        return checkpoints.steps


@pytest.mark.slow
def test_a_killed_run_that_goes_back_again_ends_the_same(tmp_path):
    options = dict(on_nonfinite="skip", max_skips=2, after_max_skips="rollback")
    assert run(tmp_path / "a", range(10, 13), **options) == 0
    assert run(tmp_path / "b", range(10, 13), **options) == 0
    for step in (16, 20, 24):  # as if killed at step 15, after the rollback
        shutil.rmtree(tmp_path / f"b/checkpoints/{step}")
    (tmp_path / "b/final_result.json").unlink()
    assert run(tmp_path / "b", range(10, 13), **options) == 0
    a, b = (restore_params(tmp_path / name, None)[0] for name in "ab")
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("given", "says"), [
    (dict(spike_sigma=0.0), "spike_sigma=0.0 must be above 0"), (dict(spike_window=1), "at least 2"),
    (dict(after_max_skips="rollback"), "no update is ever left out"), (dict(max_rollbacks=-1), "at least 0"),
    (dict(after_max_skips="rollback", spike_sigma=6.0, carry_state=True), "carry_state goes on in its own")])
def test_rules_that_cannot_be_followed_are_refused(given, says):
    with pytest.raises(ValueError, match=says):
        TrainOptions(**given).check()
