"""Option classes: dataclasses whose fields carry a default, a type and a line of documentation.

A group of the config (`data`, `optimizer`, ...) is such a class; so is a layer, whose fields are its hyperparameters.
`fill` turns what a config file gives into the complete group and finds every mistake before anything is compiled.
"""

import copy
import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_PLAIN = (bool, int, float, str)


def option(default: Any, doc: str) -> Any:
    """A dataclass field with a default and one line of documentation, which the config reference prints."""
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata={"doc": doc})
    return dataclasses.field(default=default, metadata={"doc": doc})


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """"; did you mean 'x'?" for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Name to type of the fields that a config may set (a Flax module's `parent` and `name` are not among them)."""
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls!r} is not an option class; it must be a dataclass")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    # Only a Flax module has both: an option class may well have a `name` to set.
    inherited = {"parent", "name"} if {"parent", "name"} <= set(names) else set()
    return {name: hints[name] for name in names if name not in inherited}


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
    """A type as users write it: `int`, `float | None`, `tuple[str, ...]`, `'low' | 'high'`."""
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if hint in (None, types.NoneType):
        return "None"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(arm) for arm in arms)
    if origin is typing.Literal:
        return " | ".join(repr(arm) for arm in arms)
    if isinstance(origin, type) and arms:
        inside = ", ".join("..." if arm is Ellipsis else type_name(arm) for arm in arms if not isinstance(arm, list))
        return f"{origin.__name__}[{inside}]"
    return getattr(hint, "__name__", str(hint))


def _conform_sequence(value: Any, kind: type, arms: tuple[Any, ...]) -> Any:
    if not isinstance(value, (tuple, list)):
        raise TypeError
    if not arms:
        return kind(value)
    if kind is list or arms[-1] is Ellipsis:
        return kind(conform(v, arms[0]) for v in value)
    if len(arms) != len(value):
        raise TypeError
    return tuple(conform(v, arm) for v, arm in zip(value, arms, strict=True))


def conform(value: Any, hint: Any) -> Any:
    """`value` as the type `hint` wants it (int to float, 3.0 to int, list to tuple); TypeError where it cannot be.

    A type that config files cannot write (a class, a callable) takes any value: its owner checks it.
    """
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        exact = [arm for arm in arms if arm in _PLAIN and type(value) is arm]
        for arm in (*exact, *arms):
            try:
                return conform(value, arm)
            except TypeError:
                pass
        raise TypeError
    if hint in (None, types.NoneType):
        if value is not None:
            raise TypeError
        return None
    if origin is typing.Literal:
        # The type is compared too: True is not 1 to a user.
        if not any(type(arm) is type(value) and arm == value for arm in arms):
            raise TypeError
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint is int and type(value) is float and value.is_integer():
        return int(value)
    if hint in _PLAIN:
        if type(value) is not hint:
            raise TypeError
        return value
    for kind, names in ((tuple, (tuple, Sequence)), (list, (list,))):
        if hint in names or origin in names:
            # Sequence[int] names one type for every item, as tuple[int, ...] does.
            return _conform_sequence(value, kind, (*arms, ...) if origin is Sequence else arms)
    if hint in (dict, Mapping) or origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise TypeError
        return {conform(k, arms[0]): conform(v, arms[1]) for k, v in value.items()} if arms else dict(value)
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
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a group of fields; got {given!r} ({type(given).__name__}). "
                         f"It takes: {', '.join(sorted(hints))}")
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
