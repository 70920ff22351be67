"""Options: what a config gives is checked, completed and typed, and every mistake names what would have been right."""

import collections.abc
import dataclasses
import typing
from typing import Any, Literal

import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from lm.core.fields import build, conform, defaults, did_you_mean, field_types, fill, option, type_name


@dataclasses.dataclass(frozen=True)
class Options:
    source: str = option("text", "where documents come from")
    mixture: dict[str, float] = option({"a": 1.0}, "weights by name")
    window: int | None = option(None, "tokens seen")
    rate: float = option(0.1, "per step")
    names: tuple[str, ...] = option((), "names")
    pair: tuple[int, float] = option((1, 2.0), "both")
    order: Literal["packed", "plain", 1] = option("packed", "how")
    on: bool = option(False, "switch")

    def check(self):
        if self.rate > 1:
            raise ValueError(f"config.data.rate must be at most 1; got {self.rate}")


@dataclasses.dataclass(frozen=True)
class Needy:
    size: int
    name: str = "x"


def test_fill_gives_every_field_and_keeps_what_is_given():
    out = fill(Options, {"window": 3, "names": ["a", "b"], "rate": 1}, "config.data")
    assert out == {"source": "text", "mixture": {"a": 1.0}, "window": 3, "rate": 1.0, "names": ("a", "b"),
                   "pair": (1, 2.0), "order": "packed", "on": False}
    assert type(out["rate"]) is float


def test_defaults_are_not_shared_between_calls():
    first = defaults(Options)
    first["mixture"]["b"] = 2.0
    assert defaults(Options)["mixture"] == {"a": 1.0}


@pytest.mark.parametrize(("given_fields", "message"), [
    ({"sourc": "x"}, "config.data has no field 'sourc'; did you mean 'source'? It takes: mixture, names,"),
    ({"window": "3"}, "config.data.window must be int | None; got '3' (str)"),
    ({"window": 3.5}, "config.data.window must be int | None; got 3.5 (float)"),
    ({"on": 1}, "config.data.on must be bool; got 1 (int)"),
    ({"window": True}, "config.data.window must be int | None; got True (bool)"),
    ({"names": "abc"}, "config.data.names must be tuple[str, ...]; got 'abc' (str)"),
    ({"names": ("a", 1)}, "config.data.names must be tuple[str, ...]"),
    ({"pair": (1,)}, "config.data.pair must be tuple[int, float]; got (1,) (tuple)"),
    ({"order": "pakced"}, "config.data.order must be 'packed' | 'plain' | 1; got 'pakced' (str)"),
    ({"order": True}, "config.data.order must be"),
    ({"mixture": {"a": "x"}}, "config.data.mixture must be dict[str, float]"),
    ({"mixture": 3}, "config.data.mixture must be dict[str, float]; got 3 (int)"),
])
def test_mistakes_name_the_field_the_value_and_what_is_allowed(given_fields, message):
    with pytest.raises(ValueError) as error:
        fill(Options, given_fields, "config.data")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_group_that_is_a_value_is_refused():
    with pytest.raises(ValueError, match=r"config\.data must be a group of fields; got 3 \(int\)"):
        fill(Options, 3, "config.data")


def test_a_field_without_default_must_be_given():
    with pytest.raises(ValueError, match=r"config\.model needs size, which has no default"):
        fill(Needy, {}, "config.model")
    assert fill(Needy, {"size": 2.0}, "config.model") == {"size": 2, "name": "x"}


def test_build_checks_combinations():
    assert build(Options, {"rate": 0.5}, "config.data").rate == 0.5
    with pytest.raises(ValueError, match="rate must be at most 1"):
        build(Options, {"rate": 2}, "config.data")


def test_a_flax_module_takes_its_hyperparameters_only():
    class Layer(nn.Module):
        heads: int = 4
        window: int | None = None

    assert set(field_types(Layer)) == {"heads", "window"}
    assert fill(Layer, {"window": 8.0}, "config.model.layer") == {"heads": 4, "window": 8}
    with pytest.raises(ValueError, match="has no field 'parent'"):
        fill(Layer, {"parent": None}, "config.model.layer")


def test_only_dataclasses_are_option_classes():
    with pytest.raises(TypeError, match="must be a dataclass"):
        field_types(int)


@pytest.mark.parametrize(("value", "hint", "expected"), [
    (1, int | str, 1), ("1", int | str, "1"), (1, float | None, 1.0), (None, float | None, None),
    ([1, 2], tuple[int, ...], (1, 2)), ([1, "a"], tuple, (1, "a")), ((1, 2), list[int], [1, 2]),
    ((1, 2), collections.abc.Sequence[float], (1.0, 2.0)), ({"a": [1]}, dict[str, tuple[int, ...]], {"a": (1,)}),
    (1, Any, 1), (2.0, int, 2), (1, float | int, 1), (((1,),), tuple[tuple[int, ...], ...], ((1,),)),
    ({"a": 1}, collections.abc.Mapping[str, Any], {"a": 1}), (print, collections.abc.Callable, print),
])
def test_conform(value, hint, expected):
    out = conform(value, hint)
    assert out == expected
    assert type(out) is type(expected)


@pytest.mark.parametrize(("value", "hint"), [
    (float("inf"), int), (float("nan"), int), ("x", float), (True, float), (1, str), (None, int), (1, None),
    ({1: 2}, dict[str, int]), ("ab", collections.abc.Sequence[str]),
])
def test_conform_refuses(value, hint):
    with pytest.raises(TypeError):
        conform(value, hint)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)))
def test_conform_is_idempotent(value):
    hint = None | bool | int | str | tuple
    once = conform(value, hint)
    assert conform(once, hint) == once


@pytest.mark.parametrize(("hint", "text"), [
    (int, "int"), (int | None, "int | None"), (tuple[str, ...], "tuple[str, ...]"),
    (typing.Optional[int], "int | None"),  # noqa: UP045 (Flax and older code write it so)
    (dict[str, float], "dict[str, float]"), (Literal["a", "b"], "'a' | 'b'"), (Any, "Any"), (tuple, "tuple"),
    (tuple[tuple[str, float] | None, ...], "tuple[tuple[str, float] | None, ...]"), (None, "None"),
])
def test_types_are_written_as_users_write_them(hint, text):
    assert type_name(hint) == text


def test_the_nearest_name_is_named_only_when_it_is_near():
    assert did_you_mean("sourc", ["source", "steps"]) == "; did you mean 'source'?"
    assert did_you_mean("zzz", ["source", "steps"]) == ""
