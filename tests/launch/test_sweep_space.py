"""The space of a sweep: what text and data mean, and what is refused."""

import optuna
import pytest

from launch.sweeps.definition import from_data, same
from launch.sweeps.space import examples, grid, parse_text, read_space, suggest

LR, WIDTH = "optimizer.learning_rate", "model.embed_dim"


@pytest.mark.parametrize(("text", "data"), [
    ("loguniform(1e-4, 1e-2)", {"low": 1e-4, "high": 1e-2, "log": True, "integer": False}),
    ("int(2,8)", {"low": 2, "high": 8, "log": False, "integer": True}), ("gelu, swiglu", ["gelu", "swiglu"]),
    ("64,128", [64, 128]), ("1e-3,None,True", [1e-3, None, True]), ("(64,2),(128,4)", [(64, 2), (128, 4)])])
def test_text_means_data(text, data):
    assert parse_text(text) == data


@pytest.mark.parametrize(("given", "says"), [
    ({"lr": [1]}, "GROUP.FIELD"), ({LR: 3}, "a list of values"), ({LR: []}, "a list of values"),
    ({LR: {"low": 1, "hihg": 2}}, "did you mean 'high'"), ({LR: {"low": 2, "high": 1}}, "lower to a higher"),
    ({LR: {"low": 0, "high": 1, "log": True}}, "above 0"), ({LR: {"low": 0}}, "needs high"),
    ({f"{LR},{WIDTH}": [1, 2]}, "names 2 fields"), ({f"{LR},{WIDTH}": {"low": 0, "high": 1}}, "only together"),
    ({LR: [1], f"{LR},{WIDTH}": [(1, 2)]}, "values twice"),
    ({LR: {"values": [1], "when": {"optimizer.name": "sgd"}}}, "does not vary before it")])
def test_a_space_that_makes_no_sense_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        read_space(given)


@pytest.mark.parametrize("text", ["loguniform(1)", "int(1.5,2)", "uniform(a,b)", "normal(0,1)"])
def test_text_that_is_no_range_is_refused(text):
    with pytest.raises(ValueError, match="--param"):
        parse_text(text)


def test_a_grid_has_every_combination_once_and_conditions_hold():
    space = read_space({"optimizer.momentum": {"values": [0.8, 0.9], "when": {"optimizer.name": "sgd"}},
                        "optimizer.name": ["adamw", "sgd"], f"{WIDTH},model.num_layers": [(64, 2), (128, 4)]})
    assert [p.name for p in space] == ["optimizer.name", f"{WIDTH},model.num_layers", "optimizer.momentum"]
    cells = grid(space)
    assert len(cells) == 2 + 4 and len({str(cell) for cell in cells}) == 6
    assert all(("optimizer.momentum" in cell) == (cell["optimizer.name"] == "sgd") for cell in cells)
    study = optuna.create_study()
    seen = []
    for cell in cells:
        study.enqueue_trial(cell)
        seen.append(suggest(study.ask(), space))
    assert {(row[WIDTH], row["model.num_layers"]) for row in seen} == {(64, 2), (128, 4)}
    assert sum("optimizer.momentum" in row for row in seen) == 4


def test_what_has_to_resolve_touches_every_value_and_both_ends():
    space = read_space({LR: {"low": 1e-4, "high": 1e-2}, "train.steps": {"low": 1, "high": 9},
                        "optimizer.name": ["adamw", "sgd"], "optimizer.momentum": {"values": [0.8],
                                                                                  "when": {"optimizer.name": "sgd"}}})
    texts = [dict(pairs) for pairs in examples(space)]
    assert {LR: "0.0001"} in texts and {"train.steps": "9"} in texts and {"optimizer.name": "adamw"} in texts
    assert {"optimizer.name": "sgd", "optimizer.momentum": "0.8"} in texts


@pytest.mark.parametrize(("given", "says"), [
    ({}, "varies nothing"), ({"parameters": {LR: [1]}, "sampler": "tpee"}, "did you mean 'tpe'"),
    ({"parameters": {LR: {"low": 0, "high": 1}}, "sampler": "grid"}, "a grid needs lists"),
    ({"parameters": {LR: [1]}, "sampler": "cmaes"}, "without lists"),
    ({"parameters": {LR: [1]}, "trials": 0}, "least 1"),
    ({"parameters": {LR: [1]}, "objectives": ["a", "b"], "pruner": "asha"}, "one objective"),
    ({"parameters": {LR: [1]}, "trails": 3}, "did you mean 'trials'")])
def test_a_definition_that_cannot_run_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        from_data(given, "the sweep")


def test_a_sweep_may_grow_and_nothing_else():
    old = from_data({"parameters": {LR: {"low": 0, "high": 1}}, "trials": 5}, "x")
    more = from_data({"parameters": {LR: {"low": 0, "high": 1}}, "trials": 9}, "x")
    assert same(old, more) is None and "trials from 9 to 5" in same(more, old)
    assert "parameters" in same(old, from_data({"parameters": {LR: {"low": 0, "high": 2}}, "trials": 5}, "x"))
