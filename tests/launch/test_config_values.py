"""What counts as data in a config, and what the text of an override stands for."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import ml_collections
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import config_dict

from launch.config_values import guess, parse, plain
from lm.core.fields import conform

TEXT = st.text(max_size=8)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
DATA = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
                    max_leaves=8)


@given(DATA)
def test_plain_data_stays_and_holds_no_list(value):
    def has_list(v):
        inside = v.values() if isinstance(v, dict) else v if isinstance(v, tuple) else ()
        return isinstance(v, list) or any(map(has_list, inside))

    made = plain(value, "config")
    assert not has_list(made)
    assert plain(made, "config") == made


def test_scalars_of_numpy_and_config_dicts_become_plain():
    config = ml_collections.ConfigDict({"a": {"b": [1, (2,)]}})
    config.c = config.get_ref("a").get().get_ref("b")  # a reference to another field is its value
    made = plain({"x": np.float32(0.5), "y": np.int64(3), "z": config}, "config")
    assert made == {"x": 0.5, "y": 3, "z": {"a": {"b": (1, (2,))}, "c": (1, (2,))}}
    assert (type(made["x"]), type(made["y"])) == (float, int)


def _placeholder():
    config = ml_collections.ConfigDict()
    config.rate = config_dict.placeholder(float, required=True)
    return config


@pytest.mark.parametrize(("value", "message"), [
    (np.zeros(3), "config.model.x is an array; a config holds data only"),
    (print, "config.model.x is a builtin_function_or_method; a config holds data only"),
    (functools, "config.model.x is a module"),
    (float, "config.model.x is a type"),
    ({1, 2}, "config.model.x is a set"),
    ([1, [print]], "config.model.x[1][0] is a builtin"),
    ({"y": {2: "z"}}, "config.model.x.y has the key 2 (int); keys must be text"),
    (math.inf, "config.model.x is inf, which JSON cannot hold"),
    (math.nan, "config.model.x is nan, which JSON cannot hold"),
    (_placeholder(), "config.model.x.rate is a placeholder without a value"),
])
def test_what_is_no_data_is_refused_by_path(value, message):
    with pytest.raises(ValueError) as error:
        plain({"model": {"x": value}}, "config")
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(("text", "hint", "value"), [
    ("1e-3", str, "1e-3"), ("None", str, "None"), ("'None'", str | None, "None"), ("None", str | None, None),
    ("", str, ""), ('"a b"', str, "a b"), ("it's", str, "it's"), ("(a|b)+", str, "(a|b)+"), (" x ", str, " x "),
    ("1", float, 1), ("1e-3", float, 1e-3), ("-2", int, -2), ("1_000", int, 1000), ("1e3", int, 1000.0),
    ("None", float | None, None), ("null", int | None, None), ("3", int | None, 3), ("3.5", int | float, 3.5),
    ("true", bool, True), ("False", bool, False), ("0", bool, False), ("1", bool | None, True),
    ("(1,2)", tuple[int, ...], (1, 2)), ("[1, 2]", tuple[int, ...], (1, 2)), ("1,2", tuple[int, ...], (1, 2)),
    ("7", tuple[int, ...], (7,)), ("()", tuple[int, ...], ()), ("(1,)", tuple, (1,)),
    ("1,x", tuple[int, str], (1, "x")),
    ("(attention/mlp,rwkv4/mlp)", tuple[str, ...], ("attention/mlp", "rwkv4/mlp")),
    ("('attention/mlp',)", tuple[str, ...], ("attention/mlp",)), ("a.txt", Sequence[str], ("a.txt",)),
    ("1,2", tuple[str, ...], ("1", "2")), ("((1,2),(3,))", tuple[tuple[int, ...], ...], ((1, 2), (3,))),
    ("a,b", str | tuple[str, ...], "a,b"), ("(a,b)", str | tuple[str, ...] | None, ("a", "b")),
    ('{"a": 1, "b": [1, 2]}', dict, {"a": 1, "b": (1, 2)}), ("{a: 1}", dict[str, float], {"a": 1}),
    ("{a: {b: None}}", dict, {"a": {"b": None}}), ("{}", dict, {}), ("{'.*b': 2}", dict, {".*b": 2}),
    ("{kind: bytes}", str | dict | None, {"kind": "bytes"}), ("bytes", str | dict | None, "bytes"),
    ("({match: '.*/bias', freeze: true}, {match: 'x,y', weight_decay: 0})", tuple[dict, ...],
     ({"match": ".*/bias", "freeze": True}, {"match": "x,y", "weight_decay": 0})),
    ("low", Literal["low", "high"], "low"), ("1", Literal[1, 2], 1), ("'low'", Literal["low"], "low"),
    ("none", Literal["none", "full"], "none"), ("None", Literal["a"] | None, None),
    ("5", Any, 5), ("x y", Any, "x y"), ("http://a:1", Any, "http://a:1"), ("1,2", Any, "1,2"),
    ("[a, 1]", Any, ("a", 1)),
])
def test_text_is_read_by_the_type_of_its_field(text, hint, value):
    made = parse(text, hint)
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(("text", "hint"), [
    ("x", int), ("(1", tuple[int, ...]), ("{a: 1", dict), ("{a}", dict[str, int]), ("maybe", bool),
    ("1,2,3", tuple[int, int]),
])
def test_text_that_does_not_fit_is_left_for_the_check_of_the_field(text, hint):
    with pytest.raises(TypeError):
        conform(parse(text, hint), hint)


@given(LEAVES.filter(lambda v: not isinstance(v, str)) | st.lists(st.integers(), max_size=3).map(tuple))
def test_the_text_of_a_value_is_read_as_that_value(value):
    assert guess(repr(value)) == value


@given(TEXT)
def test_quoted_text_is_read_as_that_text(text):
    assert parse(repr(text), str) == text
    assert parse(repr(text), str | None) == text
    assert parse(f"({text!r}, {text!r})", tuple[str, ...]) == (text, text)
