"""Which checkpoints are kept, and what restoring says when it cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import ADAMW, MODEL, VOCAB, make_recipe

from lm.core.sharding import make_mesh
from lm.core.tree import named_leaves
from lm.models.build import build_model
from lm.train.checkpoint import checkpoint_folder, open_checkpoints, restore_params
from lm.train.options import CheckpointOptions

METRIC = "eval/validation/loss"


@pytest.fixture(scope="module")
def recipe():
    return make_recipe(build_model(MODEL, VOCAB), dict(ADAMW, ema_decay=0.9))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 4})


def save_all(workdir, recipe, mesh, options, values):
    state = recipe.create(0, mesh)
    with open_checkpoints(workdir, options) as checkpoints:
        for step, value in enumerate(values, start=1):
            checkpoints.save(step, state._replace(step=jnp.int32(step)), {"step": step, "data": {}},
                             {} if value is None else {METRIC: value})
            checkpoints.wait()
        return checkpoints.steps


def test_the_newest_and_the_best_are_kept(recipe, mesh, tmp_path):
    options = CheckpointOptions(keep=2, keep_best=1)
    assert save_all(tmp_path, recipe, mesh, options, [3.0, 1.0, 2.0, None, 2.5, None]) == [2, 5, 6]


def test_the_best_is_remembered_after_a_restart(recipe, mesh, tmp_path):
    options = CheckpointOptions(keep=1, keep_best=1)
    assert save_all(tmp_path, recipe, mesh, options, [1.0, None, 2.0]) == [1, 3]
    state = recipe.create(0, mesh)
    with open_checkpoints(tmp_path, options) as checkpoints:
        for step, metrics in ((4, {METRIC: 3.0}), (5, None)):
            checkpoints.save(step, state, {"step": step, "data": {}}, metrics)
            checkpoints.wait()
        assert checkpoints.steps == [1, 5]


def test_only_the_newest_are_kept(recipe, mesh, tmp_path):
    assert save_all(tmp_path, recipe, mesh, CheckpointOptions(keep=2), [None] * 4) == [3, 4]


def test_everything_comes_back_as_it_was_and_on_another_mesh(recipe, mesh, tmp_path):
    save_all(tmp_path, recipe, mesh, CheckpointOptions(), [None])
    state = recipe.create(0, mesh)
    other = make_mesh({"fsdp": 2, "tensor": 2}, devices=jax.devices()[:4])
    with open_checkpoints(tmp_path, CheckpointOptions()) as checkpoints:
        back, meta = checkpoints.restore(recipe.abstract(other))
    assert meta["step"] == 1 and int(back.step) == 1
    assert back.key.dtype == state.key.dtype
    np.testing.assert_array_equal(jax.random.key_data(back.key), jax.random.key_data(state.key))
    for name, leaf in named_leaves({"params": state.params["params"], "opt": state.opt_state}).items():
        found = named_leaves({"params": back.params["params"], "opt": back.opt_state})[name]
        np.testing.assert_array_equal(found, leaf)
        assert found.sharding.mesh.shape == other.shape


def test_parameters_alone(recipe, mesh, tmp_path):
    save_all(tmp_path, recipe, mesh, CheckpointOptions(), [None])
    state = recipe.create(0, mesh)
    for ema in (False, True):
        found, step = restore_params(tmp_path, None, ema=ema)
        assert step == 1
        for name, leaf in named_leaves(state.params).items():
            assert isinstance(named_leaves(found)[name], np.ndarray)
            np.testing.assert_array_equal(named_leaves(found)[name], leaf)
    found, _ = restore_params(tmp_path, recipe.abstract(mesh).params)
    for name, leaf in named_leaves(found).items():
        assert leaf.sharding == named_leaves(recipe.shardings(mesh).params)[name]


def test_a_workdir_may_be_relative(recipe, mesh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert save_all("runs/a", recipe, mesh, CheckpointOptions(), [None]) == [1]
    assert (tmp_path / "runs/a/checkpoints/1").is_dir()
    assert restore_params("runs/a", None)[1] == 1
    assert str(checkpoint_folder("gs://bucket/a")) == "gs://bucket/a/checkpoints"


def test_what_is_not_there_is_named(recipe, mesh, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        restore_params(tmp_path, None)
    save_all(tmp_path, recipe, mesh, CheckpointOptions(), [None])
    with pytest.raises(ValueError, match=r"no checkpoint of step 7 .*there are \[1\]"):
        restore_params(tmp_path, None, 7)


def test_no_empty_folder_stays_behind(tmp_path):
    with open_checkpoints(tmp_path / "run", CheckpointOptions()):
        pass
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_checkpoint_of_another_model_is_refused_by_name_and_in_one_line(recipe, mesh, tmp_path):
    save_all(tmp_path, recipe, mesh, CheckpointOptions(), [None])
    wider = make_recipe(build_model({**MODEL, "embed_dim": 64}, VOCAB), dict(ADAMW, ema_decay=0.9)).abstract(mesh)
    leaf = r"embed/embedding is \(\d+, 32\) there and \(\d+, 64\) in this config"
    with (open_checkpoints(tmp_path, CheckpointOptions()) as checkpoints,
          pytest.raises(ValueError, match=f"does not fit this config or is damaged: .*{leaf}") as restoring):
        checkpoints.restore(wider)
    with pytest.raises(ValueError, match=f"does not fit this config.*{leaf}") as reading:
        restore_params(tmp_path, wider.params)
    assert "opt_state/" not in str(restoring.value)  # parameters come first
    assert "\n" not in str(restoring.value) + str(reading.value)


def test_a_checkpoint_of_another_optimizer_is_refused(recipe, mesh, tmp_path):
    save_all(tmp_path, recipe, mesh, CheckpointOptions(), [None])
    other = make_recipe(build_model(MODEL, VOCAB), {"name": "lion", "ema_decay": 0.9}).abstract(mesh)
    with (open_checkpoints(tmp_path, CheckpointOptions()) as checkpoints,
          pytest.raises(ValueError, match=r"does not fit this config.*opt_state/.* absent in this config")):
        checkpoints.restore(other)
