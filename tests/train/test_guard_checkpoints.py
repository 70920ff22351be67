"""A guard comes and goes: checkpoints from before there was one, with one, and with one of another window."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
from runs import MODEL, VOCAB, make_recipe

from lm.core.sharding import make_mesh
from lm.models.build import build_model
from lm.train.checkpoint import open_checkpoints
from lm.train.options import CheckpointOptions
from lm.train.state import TrainState

Older = collections.namedtuple("Older", [name for name in TrainState._fields if name != "guard"])


@pytest.fixture(scope="module")
def recipe():
    return make_recipe(build_model(MODEL, VOCAB), dict(name="sgd", learning_rate=0.1, schedule="constant"))


@pytest.mark.parametrize("saved", ["older", None, 4, 6])
@pytest.mark.parametrize("wanted", [None, 4])
def test_every_checkpoint_restores_with_and_without_a_guard(recipe, tmp_path, saved, wanted):
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    window = None if saved == "older" else saved
    state = dataclasses.replace(recipe, spike_window=window).create(0, mesh)
    if window is not None:
        state = state._replace(guard=state.guard._replace(spikes=state.guard.spikes + 7))
    written = Older(*state[:-1]) if saved == "older" else state
    with open_checkpoints(tmp_path, CheckpointOptions()) as checkpoints:
        checkpoints.save(1, written, {"step": 1})
        abstract = dataclasses.replace(recipe, spike_window=wanted).abstract(mesh)
        back, _ = checkpoints.restore(abstract)
    assert jax.tree.structure(back) == jax.tree.structure(abstract)
    assert jax.tree.map(np.shape, back) == jax.tree.map(np.shape, abstract)
    jax.tree.map(np.testing.assert_array_equal, back.params, state.params)
    if wanted is not None:
        assert int(back.guard.spikes) == (7 if saved == wanted else 0)
