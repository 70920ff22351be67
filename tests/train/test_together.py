"""Several runs in one program are the runs that they are alone; one that breaks does not touch the others."""

import functools
import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from runs import ADAMW, MODEL, VOCAB, losses, make_recipe, packed_batch

from lm.core.sharding import make_mesh
from lm.models.build import build_model, make_apply
from lm.optim.rules import Row
from lm.optim.scalars import same_program
from lm.tasks.build import build_objective
from lm.train.exit_codes import DONE, NONFINITE
from lm.train.group_step import WAYS, make_group_step, stacked_scalars
from lm.train.loop import Experiment, Schedule
from lm.train.options import CheckpointOptions, LogOptions, TrainOptions
from lm.train.places import Places
from lm.train.together import Member, train_together

LOSS = {"next_token": 1.0, "z_loss": 1e-3}


def group_losses(optimizers, batches_of, *, steps=10, model=None, devices=1, way="vmap"):
    """[steps, runs] losses of runs of seed 0 in one program, and what gives the state of one of them."""
    built = build_model({**MODEL, **(model or {})}, VOCAB)
    recipes = [make_recipe(built, optimizer) for optimizer in optimizers]
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    places = Places(len(recipes), jax.devices()[:devices])
    step = jax.jit(make_group_step(make_apply(built), build_objective(LOSS), recipes[0], TrainOptions(steps=100),
                                   shared_batch=False, way=way, mesh=places.mesh), donate_argnums=0)
    rates, found = stacked_scalars(places.filled([recipe.optimizer for recipe in recipes])), []
    with jax.set_mesh(mesh):
        states = places.put([recipe.create(0, mesh) for recipe in recipes])
    with jax.set_mesh(places.mesh):
        for n in range(steps):
            batch = jax.tree.map(lambda *rows: np.stack(rows), *places.filled([of(n) for of in batches_of]))
            states, metrics = step(states, rates, batch)
            found.append(np.array(metrics["train/loss"])[:len(recipes)])
    return np.array(found), lambda place: places.take(states, place, NamedSharding(mesh, PartitionSpec()))


@pytest.mark.parametrize("way", WAYS)
def test_ten_steps_together_equal_ten_steps_alone_also_beside_a_run_that_breaks(way):
    """Over two devices, where the three runs leave a place that is filled with a copy."""
    optimizers = [dict(ADAMW, schedule="cosine", warmup_steps=4),
                  dict(ADAMW, schedule="cosine", warmup_steps=4, learning_rate=1e-2, weight_decay=0.5)]
    datas = [packed_batch, lambda n: packed_batch(n + 100)]
    broken = dict(optimizers[0], learning_rate=1e38)
    small = dict(num_layers=1)
    together, state = group_losses([*optimizers, broken], [*datas, packed_batch], model=small, way=way,
                                   devices=2)
    alone = [losses(optimizer=optimizer, batch_of=data, model=small)
             for optimizer, data in zip(optimizers, datas, strict=True)]
    np.testing.assert_allclose(together[:, :2].T, alone, rtol=1e-5)
    assert abs(together[-1, 0] - together[-1, 1]) > 1e-3
    assert [int(state(place).bad_step) for place in (0, 1)] == [-1, -1] and 0 < state(2).bad_step < 10
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state(1).params))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count, devices", [(1, 2), (3, 2), (16, 3)])
def test_any_number_of_runs_over_devices_equals_each_alone(count, devices, way):
    """16 over 3 devices are 6 on each, with two copies."""
    rates = [1e-3 * (1 + n % 5) for n in range(count)]
    datas = [lambda n, own=own: packed_batch(n + 100 * own) for own in range(count)]
    optimizers = [dict(ADAMW, learning_rate=rate) for rate in rates]
    together, _ = group_losses(optimizers, datas, model=dict(num_layers=1), devices=devices, way=way)
    alone = [losses(optimizer=optimizer, batch_of=data, model=dict(num_layers=1))
             for optimizer, data in zip(optimizers, datas, strict=True)]
    np.testing.assert_allclose(together.T, alone, rtol=1e-5)


def test_runs_lie_on_few_devices_and_are_found_again():
    places = Places(5, jax.devices()[:4])
    assert (places.each, places.mesh.size) == (2, 3)
    trees = [{"a": jax.numpy.full(3, n), "key": jax.random.key(n)} for n in range(5)]
    tree = places.put(trees)
    assert {shard.data.shape for shard in tree["a"].addressable_shards} == {(2, 3)}
    home = trees[0]["a"].sharding
    for n in range(5):
        taken = places.take(tree, n, home)
        assert list(taken["a"]) == [n] * 3 and taken["a"].sharding == taken["key"].sharding == home
        assert jax.random.key_data(taken["key"])[1] == n


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [
    dict(name="sgd", schedule="wsd", decay_fraction=0.9), dict(name="lion", schedule="inverse_sqrt", warmup_steps=3),
    dict(name="muon", adam_learning_rate=1e-3, schedule="exponential"), dict(name="adafactor", state_dtype="bfloat16")],
    ids=lambda o: o["name"])
def test_every_optimizer_and_schedule_together_equals_alone(optimizer):
    optimizers = [dict(optimizer, learning_rate=2e-3), dict(optimizer, learning_rate=5e-3, weight_decay=0.3)]
    together, _ = group_losses(optimizers, [packed_batch, packed_batch])
    np.testing.assert_allclose(together.T, [losses(optimizer=one) for one in optimizers], rtol=1e-5)


def test_decay_that_is_off_in_one_run_only_is_refused():
    row = Row("kernel", (2, 2), 0, "adamw", 1.0, 0.1, False)
    assert same_program((row,), (Row("kernel", (2, 2), 0, "adamw", 1.0, 0.3, False),))
    assert not same_program((row,), (Row("kernel", (2, 2), 0, "adamw", 1.0, 0.0, False),))


@pytest.mark.slow
@pytest.mark.parametrize("devices, way", [(1, "vmap"), (3, "map")])
def test_runs_end_one_by_one_and_go_on_from_different_steps(tmp_path, devices, way):
    """Of four runs one breaks and one is stopped, so that a smaller program goes on; that one is resumed beside a new
    one."""
    built = build_model(MODEL, VOCAB)
    apply, mesh = make_apply(built), make_mesh({"data": 1}, devices=jax.devices()[:1])
    rates = [3e-3, 1e-2, 1e38, 5e-3, 2e-3]
    stopped = [False]

    def members(names):
        def evaluate(params, step, note, name):
            stopped[0] |= name == 3 and step == 4
            return {"eval/validation/loss": float(step)}
        for name in names:
            recipe = make_recipe(built, dict(ADAMW, learning_rate=rates[name]))
            batches = lambda start, index, count: ((n, packed_batch(n)) for n in range(start, 1000))
            experiment = Experiment(apply, build_objective(LOSS), recipe, batches,
                                    lambda step, index, count: packed_batch(step),
                                    functools.partial(evaluate, name=name), {"fingerprint": "x"})
            yield Member(experiment, tmp_path / str(name), TrainOptions(steps=8, batch_size=8, seq_len=16),
                         CheckpointOptions(every=4), LogOptions(every=1, tensorboard=False), Schedule(2),
                         (tmp_path / f"{name}.txt").open("a"), wanted=lambda name=name: not (name == 3 and stopped[0]))

    rows = lambda name: {row["step"]: row["train/loss"] for row in map(
        json.loads, (tmp_path / f"{name}/metrics.jsonl").read_text().splitlines()) if "train/loss" in row}
    with jax.set_mesh(mesh):
        codes = train_together(list(members([0, 1, 2, 3])), mesh, jax.devices()[:devices], way)
        assert codes == [DONE, DONE, NONFINITE, 75]
        assert sorted(rows(3)) == [1, 2, 3, 4, 5] and list((tmp_path / "2").glob("nonfinite_step*"))
        for name in (0, 1):
            np.testing.assert_allclose(list(rows(name).values()), losses(
                optimizer=dict(ADAMW, learning_rate=rates[name]), steps=8), rtol=1e-5)
        stopped[0] = False
        again = train_together(list(members([3, 0, 4])), mesh, jax.devices()[:devices], way)
        assert again == [DONE, DONE, DONE]  # from steps 5, 8 (done) and 0
        for name in (3, 4):
            np.testing.assert_allclose([rows(name)[n] for n in range(1, 9)], losses(
                optimizer=dict(ADAMW, learning_rate=rates[name]), steps=8), rtol=1e-5)
