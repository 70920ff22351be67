"""Windows of a text with the state carried between them are the whole text, but for gradients across their borders."""

import functools

import jax
import numpy as np
import pytest
import runs
from runs import ADAMW, VOCAB, B, T, losses, make_recipe

from lm.core.batch import Batch
from lm.core.sharding import make_mesh
from lm.models.build import build_model, make_apply
from lm.tasks.language_modeling import score_batch
from lm.train.carried import carried_state

WINDOWS = 4
MODEL = {**runs.MODEL, "pattern": ("rwkv4/channel_mix", "attention/mlp"), "attention": dict(num_heads=4, window=6)}
STILL = dict(name="sgd", learning_rate=1e-30, schedule="constant", warmup_steps=0)
run = functools.partial(losses, model=MODEL, steps=WINDOWS, carry_state=True, loss={"next_token": 1.0})


@functools.cache
def text() -> Batch:
    """Rows of WINDOWS * T tokens, in which documents end here and there."""
    rng, length = np.random.default_rng(0), WINDOWS * T
    tokens = rng.integers(0, VOCAB, (B, length + 1)).astype(np.int32)
    starts = rng.random((B, length)) < 0.03
    starts[:, 0] = True
    index = np.arange(length)
    positions = (index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)).astype(np.int32)
    weights = np.append(~starts[:, 1:], np.ones((B, 1), bool), axis=1).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, np.cumsum(starts, axis=1, dtype=np.int32), positions)


def window(step: int) -> Batch:
    return Batch(*(field[:, step * T:(step + 1) * T] for field in text()))


def test_windows_have_the_losses_of_the_whole_text():
    model = build_model(MODEL, VOCAB)
    params = make_recipe(model, STILL).create(0, make_mesh({"data": 1}, devices=jax.devices()[:1])).params
    scores = jax.jit(lambda params: score_batch(make_apply(model), params, text()))(params)
    parts = lambda x: x.reshape(B, WINDOWS, T)
    weights = parts(text().weights)
    want = -(parts(np.asarray(scores.logp)) * weights).sum((0, 2)) / weights.sum((0, 2))
    np.testing.assert_allclose(run(optimizer=STILL, batch_of=window), want, rtol=1e-5)


@pytest.mark.slow
def test_without_a_carried_state_the_windows_after_the_first_have_others():
    carried, fresh = (run(optimizer=STILL, batch_of=window, carry_state=carry) for carry in (True, False))
    assert fresh[0] == pytest.approx(carried[0], rel=1e-5) and (np.abs(fresh[1:] - carried[1:]) > 1e-4).all()


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    dict(microbatches=2), dict(mesh=dict(data=2, fsdp=2, tensor=2)),
    dict(mesh=dict(data=2, fsdp=2), devices=4, microbatches=2)])
def test_microbatches_and_meshes_change_nothing(options):
    devices = options.pop("devices", None)
    more = {} if devices is None else {"devices": jax.devices()[:devices]}
    got = run(optimizer=ADAMW, batch_of=window, **options, **more)
    np.testing.assert_allclose(got, run(optimizer=ADAMW, batch_of=window), rtol=1e-5)


def test_the_carry_is_split_as_the_rows_are():
    model = build_model(MODEL, VOCAB)
    recipe = make_recipe(model, STILL, carried_state(model.initial_state, B, 2))
    mesh = make_mesh({"data": 2, "fsdp": 2}, devices=jax.devices()[:4])
    held = recipe.abstract(mesh).carry
    assert held.positions.shape == (2, B // 2) and held.positions.sharding.shard_shape((2, B // 2)) == (2, B // 8)
    for leaf in jax.tree.leaves(held.stack.pattern):        # [microbatches, repeats, rows, ...]
        assert leaf.sharding.shard_shape(leaf.shape)[2] == B // 8


def test_a_state_that_grows_is_refused():
    model = build_model({**MODEL, "attention": dict(num_heads=4)}, VOCAB)
    with pytest.raises(ValueError, match=r"keeps every token .*give attention a window"):
        carried_state(model.initial_state, B)
