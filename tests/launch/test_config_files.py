"""Reading and writing configs: experiment files, config.json and workdirs; equality and differences."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from launch.config_files import ABSENT, config_hash, diff, from_json, read, to_json

NAMES = st.text(st.characters(codec="ascii", categories=["Ll"]), min_size=1, max_size=4)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=5)
TREES = st.dictionaries(NAMES, st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6), max_size=4)


@given(TREES)
def test_json_round_trip_keeps_values_types_and_tuples(tree):
    back = from_json(to_json(tree))
    assert back == tree
    assert repr(_sorted(back)) == repr(_sorted(tree))  # 1, 1.0 and True are equal to Python, not here
    assert to_json(back) == to_json(tree)
    assert diff(back, tree) == []
    assert config_hash(back) == config_hash(tree)


def _sorted(tree):
    if isinstance(tree, dict):
        return {key: _sorted(tree[key]) for key in sorted(tree)}
    return tuple(map(_sorted, tree)) if isinstance(tree, tuple) else tree


@given(TREES, TREES)
def test_a_difference_is_found_where_there_is_one(a, b):
    found = diff(a, b)
    assert bool(found) == (to_json(a) != to_json(b))
    assert [(path, y, x) for path, x, y in found] == diff(b, a)
    assert (config_hash(a) == config_hash(b)) == (not found)


def test_diff_names_paths_and_values():
    a = {"train": {"steps": 1, "lr": 1.0}, "model": {"window": None, "rules": ({"a": 1, "b": 2},)}}
    b = {"train": {"steps": 2, "lr": 1}, "model": {"rules": ({"b": 2, "a": 1},), "scan": True}}
    assert diff(a, b) == [("config.model.scan", ABSENT, True), ("config.model.window", None, ABSENT),
                          ("config.train.lr", 1.0, 1), ("config.train.steps", 1, 2)]
    assert repr(ABSENT) == "(absent)"


def test_json_does_not_depend_on_the_order_of_fields():
    assert to_json({"b": 1, "a": {"d": 1, "c": 2}}) == to_json({"a": {"c": 2, "d": 1}, "b": 1})
    assert json.loads(to_json({"a": (1, 2)})) == {"a": [1, 2]}


@pytest.mark.parametrize(("text", "message"), [("{", "is no JSON"), ("[1]", "must hold an object")])
def test_text_that_is_no_config_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        from_json(text)


@pytest.fixture
def experiment(tmp_path):
    def write(text, name="tiny.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    return write


def test_an_experiment_file_gives_a_dict_or_a_config_dict_with_or_without_argument(experiment):
    path = experiment("def get_config(size='s'):\n    return {'model': {'size': size, 'dims': [1, 2]}}\n")
    assert read(path) == {"model": {"size": "s", "dims": (1, 2)}}
    assert read(f"{path}:size=3,x")["model"]["size"] == "size=3,x"
    assert read(f"{path}:")["model"]["size"] == ""
    path = experiment("from experiments import base\ndef get_config():\n    c = base.get_config()\n"
                      "    c.train.steps = 3\n    c.model = dict(rwkv=dict())\n    return c\n")
    assert read(path)["train"] == {"steps": 3}
    assert read(path)["model"] == {"rwkv": {}}


def test_a_workdir_and_its_config_json_are_read(tmp_path):
    (tmp_path / "config.json").write_text(to_json({"train": {"steps": 3}}))
    assert read(str(tmp_path)) == read(str(tmp_path / "config.json")) == {"train": {"steps": 3}}


@pytest.mark.parametrize(("text", "spec", "message"), [
    ("def get_config():\n    return {}\n", "{}:arg", "takes no argument; got 'arg'"),
    ("def get_config(size):\n    return {}\n", "{}", r"needs an argument \(size\): write .*:VALUE"),
    ("def get_config():\n    return 3\n", "{}", "must return a ConfigDict or a dict; it returned int"),
    ("x = 1\n", "{}", r"has no function get_config\(\)"),
    ("def get_config():\n    return undefined\n", "{}", "line 2: NameError: name 'undefined'"),
    ("import nothing_of_this_name\n", "{}", "line 1: ModuleNotFoundError"),
    ("def get_config(:\n", "{}", "line 1: SyntaxError"),
    ("def get_config():\n    return {'model': {'act': print}}\n", "{}", r"config\.model\.act is a builtin"),
])
def test_a_wrong_experiment_file_is_reported_with_its_line(experiment, text, spec, message):
    with pytest.raises(ValueError, match=message):
        read(spec.format(experiment(text)))


def test_a_missing_file_is_reported_with_the_nearest(experiment, tmp_path):
    path = experiment("", "quickstart.py")
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*quickstart\.py'"):
        read(path.replace("quickstart", "quikstart"))
    with pytest.raises(FileNotFoundError, match=r"give an experiment FILE\.py"):
        read(str(tmp_path / "folder" / "x"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="is no config"):
        read(str(tmp_path / "notes.txt"))
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*quickstart\.py'"):
        read(path.removesuffix(".py"))
    with pytest.raises(FileNotFoundError, match=r"is no workdir of a run: it has no config\.json"):
        read(str(tmp_path))


def test_a_config_dict_is_written_as_its_data():
    assert to_json(ConfigDict({"a": {"b": (1, 2)}})) == to_json({"a": {"b": (1, 2)}})


def test_a_resolved_config_from_before_shells_keeps_its_grid_of_experts():
    old, new = {"kind": "peer", "num_experts": 9}, {"kind": "peer", "numbering": "shell"}
    read_back = from_json(json.dumps({"model": {"peer": old, "other": new, "mlp": {"kind": "mlp"}, "embed_dim": 8}}))
    assert read_back["model"] == {"peer": {**old, "numbering": "grid"}, "other": new, "mlp": {"kind": "mlp"},
                                  "embed_dim": 8}
    assert from_json('{"model": {"peer": {"num_experts": 9}}}') == {"model": {"peer": {"num_experts": 9}}}
