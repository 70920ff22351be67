"""Overrides: any field can be set after defaults are filled, and a typo is one line with the nearest full path."""

import pytest

from launch import config
from launch.config_overrides import flatten

GIVEN = {"model": {"embed_dim": 64, "num_layers": 2, "attention": {"num_heads": 4}}}


def resolve(*overrides, given=GIVEN):
    return config.resolve(given, [tuple(text.split("=", 1)) for text in overrides])


def value(resolved, path):
    for name in path.split("."):
        resolved = resolved[name]
    return resolved


@pytest.mark.parametrize(("override", "expected"), [
    ("train.steps=20", 20), ("train.steps=1e3", 1000), ("config.train.steps=20", 20), ("train.hang_seconds=3", 3.0),
    ("train.hang_seconds=None", None), ("train.init_from=1e-3", "1e-3"), ("train.init_from=None", None),
    ("optimizer.clip_norm=None", None), ("optimizer.learning_rate=1", 1.0), ("log.tensorboard=false", False),
    ("model.attention.window=None", None), ("model.attention.window=16", 16), ("model.attention.rope_theta=None", None),
    ("model.attention.qk_norm=true", True), ("model.attention.implementation=blocked", "blocked"),
    ("model.pattern=(attention/mlp,mlp)", ("attention/mlp", "mlp")), ("model.mlp.activation=relu2", "relu2"),
    ("model.vocab_size=None", None), ("model.softcap=30", 30.0), ("mesh.dcn.data=2", 2),
    ("mesh.dcn={data: 2}", {"data": 2}), ("loss.z_loss=1e-4", 1e-4), ("loss.next_token=2", 2.0),
    ("loss.chunk=64", 64), ("data.tokenizer={kind: bytes, eos_id: 3}", {"kind": "bytes", "eos_id": 3}),
    ("data.tokenizer=bytes", "bytes"), ("eval.samples=a,b", ("a", "b")), ("eval.sets.books=books.txt", "books.txt"),
    ("optimizer.rules=({match: .*bias, freeze: true},)", ({"match": ".*bias", "freeze": True},)),
])
def test_any_field_can_be_set(override, expected):
    made = resolve(override)
    made = value(made, override.partition("=")[0].removeprefix("config."))
    made = made.to_dict() if hasattr(made, "to_dict") else made
    assert made == expected
    assert type(made) is type(expected)


def test_values_that_are_no_text_are_taken_as_they_are():
    given = [("train.steps", 7), ("model.attention.window", None), ("eval.samples", ["None", "1"])]
    made = config.resolve(GIVEN, given)
    assert (made.train.steps, made.model.attention.window, made.eval.samples) == (7, None, ("None", "1"))


def test_a_layer_that_only_the_new_pattern_names_can_be_given_whole():
    pattern = "model.pattern=(bswa/mlp,)"
    whole = resolve(pattern, "model.bswa={num_heads: 2, block: 16, memory: 1}")
    assert whole == resolve(pattern, "model.bswa.num_heads=2", "model.bswa.block=16", "model.bswa.memory=1")
    with pytest.raises(ValueError, match=r"config.model.bswa has no field 'blok'"):
        resolve(pattern, "model.bswa={num_heads: 2, blok: 16}")


def test_a_core_becomes_looped_by_fields_or_whole():
    whole = resolve("model.recurrent_depth={mean: 3.0, backprop: 2}")
    assert whole == resolve("model.recurrent_depth.mean=3", "model.recurrent_depth.backprop=2")
    assert whole.model.recurrent_depth.mean == 3.0
    with pytest.raises(ValueError, match=r"recurrent_depth.*has no field 'meen'"):
        resolve("model.recurrent_depth={meen: 3.0}")


def test_the_last_of_two_overrides_wins():
    assert resolve("train.steps=5", "train.steps=6").train.steps == 6


def test_an_added_loss_keeps_the_default_one():
    assert resolve("loss.z_loss=1e-4").loss.to_dict() == {"next_token": 1.0, "z_loss": 1e-4, "chunk": None}


def test_a_whole_group_is_replaced_and_its_fields_can_be_set_in_the_same_command():
    assert resolve("loss={z_loss: 1}").loss.to_dict() == {"z_loss": 1.0, "chunk": None}
    made = resolve("train.batch_size=2", "train={steps: 5}")
    assert (made.train.steps, made.train.batch_size, made.train.seq_len) == (5, 2, 256)


def test_the_weight_of_a_loss_that_is_given_as_a_number_can_be_set_by_name():
    assert value(resolve("loss.next_token.weight=3"), "loss.next_token.weight") == 3.0


def test_an_entry_of_a_dict_is_added_to_those_that_are_there():
    given = {**GIVEN, "eval": {"sets": {"a": "a.txt"}}}
    assert resolve("eval.sets.b=b.txt", given=given).eval.sets.to_dict() == {"a": "a.txt", "b": "b.txt"}


def test_overrides_serve_together_where_none_serves_alone():
    made = resolve("model.embed_dim=96", "model.attention.num_heads=6")
    assert (made.model.embed_dim, made.model.attention.num_heads) == (96, 6)
    made = resolve("model.num_layers=3", "model.pattern=(mlp,attention,mlp)")
    assert made.model.num_layers == 3


def test_an_override_can_give_what_the_file_lacks():
    assert resolve("model.attention.num_heads=2", given={}).model.attention.num_heads == 2


def test_defaulted_entries_that_an_overridden_pattern_does_not_use_disappear():
    made = resolve("model.pattern=(attention,)")
    assert "mlp" not in made.model
    # What the file gave stays, so that a sweep may vary the pattern.
    assert resolve("model.pattern=(mlp,)").model.attention.num_heads == 4


def test_an_entry_that_only_the_override_names_is_filled():
    made = resolve("model.pattern=(attention/wide,)", "model.wide.kind=mlp", "model.wide.mlp_dim=32")
    assert (made.model.wide.kind, made.model.wide.mlp_dim, made.model.wide.activation) == ("mlp", 32, "gelu")
    assert "mlp" not in made.model


def test_what_was_given_is_not_changed():
    before = repr(GIVEN)
    resolve("model.attention.window=3", "model.pattern=(attention,)")
    assert repr(GIVEN) == before


@pytest.mark.parametrize(("override", "message"), [
    ("train.stps=3", "config has no field 'config.train.stps'; did you mean 'config.train.steps'?"),
    ("batch_size=3", "config has no field 'config.batch_size'; did you mean 'config.train.batch_size'?"),
    ("model.window=3", "config has no field 'config.model.window'; did you mean 'config.model.attention.window'?"),
    ("model.attention.windw=3",
     "config has no field 'config.model.attention.windw'; did you mean 'config.model.attention.window'?"),
    ("model.atention.num_heads=3",
     "config has no field 'config.model.atention.num_heads'; did you mean 'config.model.attention.num_heads'?"),
    ("model.embed_dm=3", "config has no field 'config.model.embed_dm'; did you mean 'config.model.embed_dim'?"),
    ("train.steps.x=3", "config has no field 'config.train.steps.x'; did you mean 'config.train.steps'?"),
    ("optimiser.learning_rate=3",
     "config has no field 'config.optimiser.learning_rate'; did you mean 'config.optimizer.learning_rate'?"),
    ("zzz.q=3", "config has no field 'config.zzz.q'; groups: model, loss, optimizer, data, train, mesh,"),
    ("train=3", "config.train is a group of fields; set one of them, or all with {name: value}; got '3'"),
    ("train..steps=3", "--config.train..steps is no path of a field; write --config.GROUP.FIELD=VALUE"),
    ("train.steps=3.5", "config.train.steps must be int; got 3.5 (float)"),
    ("train.steps=many", "config.train.steps must be int; got 'many' (str)"),
    ("model.num_layers=None", "config.model.num_layers must be int; got None (NoneType)"),
    ("model.attention.num_heads=x", "config.model.attention.num_heads must be int | None; got 'x' (str)"),
    ("model.attention.kind=atention", "config.model.pattern names 'attention', and there is no layer of kind"),
    ("model.attention=3", "config.model.attention must be a group of fields of that layer; got 3"),
    ("loss.nxt_token=1", "config.loss has no loss 'nxt_token'; did you mean 'next_token'?"),
    ("loss.chunk.x=1", "config.loss.chunk must be an int"),
    ("loss.next_token=0", "config.loss: every weight is 0 (next_token), so nothing would be learned"),
    ("data.source=txt", "config.data.source has no kind 'txt'; did you mean 'text'?"),
])
def test_mistakes_are_one_line_that_names_what_is_near(override, message):
    with pytest.raises(ValueError) as error:
        resolve(override)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_flatten_names_every_leaf_and_keeps_empty_dicts():
    assert flatten({"a": {"b": 1, "c": {}}, "d": ({"e": 1},)}) == {
        "config.a.b": 1, "config.a.c": {}, "config.d": ({"e": 1},)}


def test_an_entry_that_the_file_leaves_out_can_change_its_kind():
    made = resolve("model.mlp.kind=attention", "model.mlp.num_heads=2")
    assert (made.model.mlp.kind, made.model.mlp.num_heads) == ("attention", 2)
    assert "activation" not in made.model.mlp
