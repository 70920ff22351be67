"""Option classes: dataclasses whose fields carry a default, a type and a line of documentation.

A group of the config (`data`, `optimizer`, ...) is such a class; so is a layer, whose fields are its hyperparameters.
`fill` turns what a config file gives into the complete group and finds every mistake before anything is compiled.
"""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

_PLAIN = (bool, int, float, str)


def option(default: Any, doc: str) -> Any:
    """A dataclass field with a default and one line of documentation, which the config reference prints."""
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"doc": doc})
    return dataclasses.field(default=default, metadata={"doc": doc})


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """"; did you mean 'x'?" for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Name to type of the fields that a config may set (a Flax module's `parent` and `name` are not among them)."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init and f.name not in ("parent", "name")}


def defaults(cls: type) -> dict[str, Any]:
    """Name to default of the fields that have one."""
    out = {}
    for f in dataclasses.fields(cls):
        if f.name in field_types(cls):
            if f.default is not dataclasses.MISSING:
                out[f.name] = f.default
            elif f.default_factory is not dataclasses.MISSING:
                out[f.name] = f.default_factory()
    return out


def type_name(hint: Any) -> str:
    """A type as users write it: `int`, `float | None`, `tuple[str, ...]`."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def conform(value: Any, hint: Any) -> Any:
    """`value` as the type `hint` wants it (int to float, list to tuple); raises TypeError where it cannot be."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        arms = typing.get_args(hint)
        exact = [arm for arm in arms if arm in _PLAIN and type(value) is arm]
        for arm in (*exact, *arms):
            try:
                return conform(value, arm)
            except TypeError:
                pass
        raise TypeError
    if hint in (None, type(None)):
        if value is None:
            return None
        raise TypeError
    if origin is typing.Literal:
        if value in typing.get_args(hint):
            return value
        raise TypeError
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint in _PLAIN:
        if type(value) is hint:
            return value
        raise TypeError
    if hint is tuple or origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise TypeError
        arms = typing.get_args(hint)
        if not arms:
            return tuple(value)
        if len(arms) == 2 and arms[1] is Ellipsis:
            return tuple(conform(v, arms[0]) for v in value)
        if len(arms) != len(value):
            raise TypeError
        return tuple(conform(v, arm) for v, arm in zip(value, arms, strict=True))
    if hint in (dict, Mapping) or origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        if not isinstance(value, Mapping):
            raise TypeError
        arms = typing.get_args(hint)
        return {k: conform(v, arms[1]) if arms else v for k, v in value.items()}
    return value


def check_known(given: Iterable[str], known: Iterable[str], where: str, what: str = "field") -> None:
    """Raises ValueError naming the first given name that is not known, the nearest one that is, and all of them."""
    known = sorted(known)
    for name in given:
        if name not in known:
            raise ValueError(f"{where} has no {what} {name!r}{did_you_mean(name, known) or '.'} "
                             f"It takes: {', '.join(known)}")


def fill(cls: type, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Every field of `cls`: what is given, checked, and the defaults of the rest.

    Raises ValueError for an unknown name, a wrong type or a field without a default that is not given; `where`
    ("config.data") says in the message which group is meant.
    """
    hints = field_types(cls)
    check_known(given, hints, where)
    out = defaults(cls)
    for name, value in given.items():
        try:
            out[name] = conform(value, hints[name])
        except TypeError:
            raise ValueError(f"{where}.{name} must be {type_name(hints[name])}; got {value!r} "
                             f"({type(value).__name__})") from None
    if missing := [name for name in hints if name not in out]:
        raise ValueError(f"{where} needs {', '.join(missing)}, which has no default")
    return out


def build(cls: type[T], given: Mapping[str, Any], where: str) -> T:
    """An instance of `cls` from a config group; its own `check()` is called where it has one."""
    made = cls(**fill(cls, given, where))
    check = getattr(made, "check", None)
    if callable(check):
        check()
    return made
