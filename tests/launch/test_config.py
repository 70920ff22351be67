"""The resolved config: every group complete, locked, and checked across groups before anything is compiled."""

import argparse
import dataclasses

import pytest
from ml_collections import ConfigDict

from experiments import base
from launch import config
from launch.config_groups import GROUPS, OPTION_CLASSES, option_class
from lm.core.fields import field_types

GIVEN = {"model": {"embed_dim": 64, "num_layers": 2, "attention": {"num_heads": 4}}}


def test_every_field_of_every_group_is_there():
    made = config.resolve(GIVEN)
    assert set(made) == set(GROUPS)
    for group in OPTION_CLASSES:
        assert set(made[group]) == set(field_types(option_class(group)))
    assert made.model.mlp.activation == "gelu"
    assert made.loss.next_token == 1.0


def test_resolving_again_changes_nothing():
    once = config.resolve(GIVEN, [("loss.z_loss", "1e-4"), ("mesh.dcn", "{data: 1}")])
    assert config.diff(config.resolve(once), once) == []
    assert config.diff(config.resolve(config.from_json(config.to_json(once))), once) == []


def test_the_resolved_config_is_locked():
    made = config.resolve(GIVEN)
    with pytest.raises(AttributeError):
        made.train.stepz = 3


def test_the_base_config_has_every_group_and_no_field():
    assert set(base.get_config()) == set(GROUPS)
    assert all(not group for group in base.get_config().values())


def test_an_empty_config_is_complete():
    made = config.resolve(base.get_config())
    assert made.model.attention.num_heads is None and made.loss.next_token == 1.0


@pytest.mark.parametrize(("given", "message"), [
    ({"modle": {}}, "config has no group 'modle'; did you mean 'model'?"),
    ({"train": 3}, "config.train must be a group of fields; got 3 (int)"),
    ({"train": {"stepz": 3}}, "config.train has no field 'stepz'; did you mean 'steps'?"),
    ({"train": {"steps": "3"}}, "config.train.steps must be int; got '3' (str)"),
    ({"train": {"batch_size": 8, "microbatches": 3}}, "config.train.batch_size=8 is not divisible by microbatches=3"),
    ({"train": {"steps": 10}, "optimizer": {"warmup_steps": 11}},
     "config.optimizer.warmup_steps=11 is more than train.steps=10"),
    ({"train": {"seq_len": 64}, "model": {**GIVEN["model"], "max_positions": 32}},
     "config.train.seq_len=64 is longer than the table of positions, config.model.max_positions=32"),
    ({"model": {**GIVEN["model"], "embed_dim": 66}},
     "config.model: attention.num_heads=4 does not divide embed_dim=66"),
    ({"train": {"lora_match": "("}}, "config.train.lora_match='(' is no regular expression"),
    ({"train": {"max_skips": -1}}, "config.train.max_skips=-1 must be at least 0"),
    ({"mesh": {"fsdp": -1}}, "config.mesh: sizes must be at least 1, and one of them may be -1"),
    ({"mesh": {"data": 0}}, "config.mesh: sizes must be at least 1"),
    ({"mesh": {"dcn": {"dta": 2}}}, "config.mesh.dcn has no axis 'dta'; did you mean 'data'?"),
    ({"mesh": {"dcn": {"data": 0}}}, "config.mesh.dcn.data=0 must be at least 1"),
    ({"checkpoint": {"keep_best": 1, "best_metric": "eval/validaton/loss"}},
     "config.checkpoint.best_metric='eval/validaton/loss' is no metric of which less is better; did you mean"),
    ({"checkpoint": {"keep_best": 1}, "data": {"validation_fraction": 0.0}},
     "config.checkpoint.best_metric='eval/validation/loss' needs a validation split"),
])
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError) as error:
        config.resolve({**GIVEN, **given})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("overrides", "devices", "message"), [
    ({"train.batch_size": 8}, 1, None), ({"train.batch_size": 8}, 8, None),
    ({"train.batch_size": 12}, 8, "config.train.batch_size=12 in microbatches=1 must be divisible by the 8 rows that "
                                  "data x fsdp split it into on 8 devices; nearest: 16"),
    ({"train.batch_size": 8, "train.microbatches": 2}, 8, "must be divisible by the 8 rows"),
    ({"train.batch_size": 16, "train.microbatches": 2}, 8, None),
    ({"train.batch_size": 4, "mesh.tensor": 2}, 8, None),
    ({"train.batch_size": 4, "mesh.fsdp": 2}, 8, "the 8 rows"),
    ({"mesh.data": 3}, 8, "needs 3 devices and there are 8"),
    ({"mesh.context": 8, "train.seq_len": 100}, 8, "seq_len=100 must be divisible by config.mesh.context=8"),
    ({"mesh.dcn": {"data": 3}}, 8, "config.mesh.dcn={'data': 3} needs a multiple of 3 devices; there are 8"),
    ({"mesh.dcn": {"data": 2}, "train.batch_size": 4}, 8, "the 8 rows"),
    ({"mesh.dcn": {"data": 2}, "mesh.data": 1, "mesh.tensor": 4, "train.batch_size": 2}, 8, None),
])
def test_the_devices_must_fit_the_batch(overrides, devices, message):
    made = config.resolve(GIVEN, list(overrides.items()))
    if message is None:
        config.check(made, devices)
        return
    with pytest.raises(ValueError) as error:
        config.check(made, devices)
    assert message in str(error.value)


def test_the_shape_of_a_mesh_counts_all_slices():
    resolved = config.resolve(GIVEN, [("mesh.dcn", {"data": 4}), ("mesh.data", 1), ("mesh.fsdp", -1)])
    assert config.mesh_shape(resolved, 32) == dict(data=4, fsdp=8, expert=1, context=1, tensor=1)


def test_options_gives_the_instance():
    made = config.resolve(GIVEN, [("train.steps", "7")])
    assert dataclasses.is_dataclass(config.options(made, "train"))
    assert config.options(made, "train").steps == 7
    assert config.options(made, "mesh").sizes["data"] == -1


def test_keys_with_dots_survive():
    made = config.resolve({**GIVEN, "eval": {"sets": {"a.b": "x.txt"}}})
    assert isinstance(made, ConfigDict)
    assert made.eval.sets["a.b"] == "x.txt"
    assert config.diff(made, config.from_json(config.to_json(made))) == []


def test_the_command_line_names_a_file_or_a_workdir(tmp_path):
    def args(given, workdir):
        return argparse.Namespace(config=given, workdir=workdir, overrides=[("train.steps", "9")])

    workdir = str(tmp_path)
    with pytest.raises(ValueError, match=r"give --config FILE\.py\[:ARG\], or a --workdir that has a config\.json"):
        config.from_args(args(None, workdir))
    (tmp_path / "config.json").write_text(config.to_json(config.resolve(GIVEN)))
    assert config.from_args(args(None, workdir)).train.steps == 9
    assert config.from_args(args(None, workdir)).model.embed_dim == 64
    (tmp_path / "x.py").write_text("def get_config():\n    return dict(model=dict(attention=dict(num_heads=2)))\n")
    assert config.from_args(args(str(tmp_path / "x.py"), workdir)).model.attention.num_heads == 2
