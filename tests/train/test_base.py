"""What is frozen stays in the run that it came from, is found there again, and is never mistaken for another."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.tree import named_leaves
from lm.train import base as bases
from lm.train.checkpoint import open_checkpoints, restore_params, saved_shapes
from lm.train.options import CheckpointOptions
from lm.train.state import TrainState

PARAMS = {"params": {"query": {"kernel": jnp.arange(6.0).reshape(2, 3)}}, "stats": {"mean": jnp.ones(2)}}
LORA = {"query": {"a": jnp.full((2, 1), 3.0), "b": jnp.full((1, 3), 4.0)}}


def state(params, ema=None):
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, {"moment": jax.tree.map(jnp.ones_like, params.get("lora", {}))}, (), ema,
                      jax.random.key(0), zero, zero, zero)


def save(workdir, step, made, base=None):
    with open_checkpoints(workdir, CheckpointOptions()) as checkpoints:
        checkpoints.save(step, made, {"data": {}, "step": step, **({"base": base} if base else {})})


@pytest.fixture
def runs(tmp_path):
    """`base` at step 3, and `lora` at step 5 beside it, with averaged adapters."""
    save(tmp_path / "base", 3, state(PARAMS))
    both = {**PARAMS, "lora": LORA}
    averaged = {**PARAMS, "lora": jax.tree.map(lambda leaf: leaf + 1, LORA)}
    save(tmp_path / "lora", 5, state(both, averaged), bases.describe(tmp_path / "base", 3, tmp_path / "lora"))
    return tmp_path


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, a), jax.tree.map(np.asarray, b))


def test_only_what_learns_is_saved_and_everything_is_read(runs):
    saved = saved_shapes(runs / "lora/checkpoints/5")
    assert set(named_leaves(saved["params"])) == set(named_leaves(saved["ema"])) == {"lora/query/a", "lora/query/b"}
    params, step = restore_params(runs / "lora", None)
    assert step == 5
    equal(params, {**PARAMS, "lora": LORA})
    averaged, _ = restore_params(runs / "lora", None, ema=True)
    equal(averaged, {**PARAMS, "lora": jax.tree.map(lambda leaf: leaf + 1, LORA)})
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), {**PARAMS, "lora": LORA})
    here = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])), abstract)
    equal(restore_params(runs / "lora", here)[0], {**PARAMS, "lora": LORA})


def test_a_run_goes_on_with_the_whole_state(runs):
    both = {**PARAMS, "lora": LORA}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), state(both, both))
    with open_checkpoints(runs / "lora", CheckpointOptions()) as checkpoints:
        made, meta = checkpoints.restore(abstract)
    assert meta["base"]["step"] == 3 and meta["step"] == 5
    equal(made.params, both)
    equal(made.ema["lora"], jax.tree.map(lambda leaf: leaf + 1, LORA))
    # Nothing is shared that a donated state would free twice.
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((made.params, made.ema))]
    assert len(set(pointers)) == len(pointers)


def test_a_base_may_move_with_its_adapters(runs, tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("base", "lora"):
        shutil.move(runs / name, tmp_path / "there" / name)
    equal(restore_params(tmp_path / "there/lora", None)[0], {**PARAMS, "lora": LORA})


def test_another_checkpoint_in_its_place_is_refused(runs):
    file = runs / "base/checkpoints/3/_CHECKPOINT_METADATA"
    file.write_text(json.dumps({**json.loads(file.read_text()), "commit_timestamp_nsecs": 1}))
    with pytest.raises(ValueError, match="written anew since"):
        restore_params(runs / "lora", None)
    shutil.rmtree(runs / "base")
    with pytest.raises(ValueError, match="and not the model: that is step 3 of"):
        restore_params(runs / "lora", None)


def test_adapters_on_adapters_name_the_run_that_has_the_parameters(runs):
    noted = bases.describe(runs / "lora", 5, runs / "more")
    assert noted["workdir"] == str(runs / "base") and noted["step"] == 3 and noted["beside"] == "../base"
    assert bases.describe(runs / "base", 3, "gs://bucket/more")["workdir"] == str(runs / "base")
