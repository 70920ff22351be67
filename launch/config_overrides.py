"""Overrides, `--config.model.attention.window=None`: applied to groups whose defaults are known, by declared type."""

import copy
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launch.config_groups import GROUPS, group_types, is_entry, known_group
from launch.config_values import guess, parse, plain


def flatten(tree: Mapping[str, Any], prefix: str = "config") -> dict[str, Any]:
    """Full path to value of every leaf; an empty dict is a leaf."""
    out = {}
    for name, value in tree.items():
        path = f"{prefix}.{name}"
        out.update(flatten(value, path) if isinstance(value, Mapping) and value else {path: value})
    return out


def unknown_field(path: str, known: Iterable[str]) -> ValueError:
    """The error for a path that is no field: names the nearest full path, else where to read all of them."""
    known, leaf = list(known), path.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == leaf]
    near = difflib.get_close_matches(path, same, 1, 0.0) or _near(path, known)
    hint = f"did you mean {near[0]!r}?" if near else f"groups: {', '.join(GROUPS)}; `lm config` prints every field"
    return ValueError(f"config has no field {path!r}; {hint}")


def _near(path: str, known: list[str]) -> list[str]:
    """The known path nearest to `path`; "config.", which all share, does not count as likeness."""
    names = difflib.get_close_matches(path.removeprefix("config."), [k.removeprefix("config.") for k in known], 1, 0.6)
    return [f"config.{name}" for name in names]


def apply_overrides(given: Mapping[str, Any], overrides: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The groups of `given` with each override (path, value) put in; the last one of a path wins.

    Text is parsed by the type of its field; other values are taken as they are. Groups that no override touches are
    returned as given. Raises ValueError for a path that no group has, and for a field of a value that has none.
    """
    if not overrides:
        return dict(given)
    pairs = [(_parts(path), value) for path, value in overrides]
    known = {group: known_group(group, given.get(group, {})) for group in GROUPS}
    paths = [*flatten(known), *(f"config.{group}" for group in GROUPS)]
    out = copy.deepcopy(dict(given))
    for group in {parts[0]: None for parts, _ in pairs}:
        if group not in GROUPS:
            first = next(parts for parts, _ in pairs if parts[0] == group)
            raise unknown_field(".".join(("config", *first)), paths)
        # The model starts from what was given, so that entries which only its old pattern needed go with it; the other
        # groups from their defaults, so that an added loss is added to the default one.
        tree = out.get(group, {}) if group == "model" else copy.deepcopy(known[group])
        out[group] = _apply_group(group, tree, known[group], [p for p in pairs if p[0][0] == group], paths)
    return out


def _parts(path: str) -> tuple[str, ...]:
    parts = tuple(path.removeprefix("config.").split("."))
    if not all(parts):
        raise ValueError(f"--config.{path} is no path of a field; write --config.GROUP.FIELD=VALUE")
    return parts


def _apply_group(group: str, tree: dict[str, Any], known: Mapping[str, Any],
                 pairs: Sequence[tuple[tuple[str, ...], Any]], paths: Sequence[str]) -> dict[str, Any]:
    for parts, value in pairs:
        if len(parts) == 1:
            tree = parse(value, dict) if isinstance(value, str) else value
            if not isinstance(tree, Mapping):
                raise ValueError(f"config.{group} is a group of fields; set one of them, or all with {{name: value}}; "
                                 f"got {value!r}")
            tree = dict(plain(tree, f"config.{group}"))
    inner = [(parts[1:], value) for parts, value in pairs if len(parts) > 1]
    if group == "loss":  # a weight alone is short for an entry
        for name in {names[0] for names, _ in inner if len(names) > 1}:
            if isinstance(tree.get(name), (int, float)):
                tree[name] = {"weight": tree[name]}
    kinds = {names[0]: {"kind": value} for names, value in inner if group == "model" and names[1:] == ("kind",)}
    entry = lambda names: len(names) > 1 or (group == "model" and is_entry(names[0]))  # a new one, by field or whole
    named = {names[0]: {} for names, _ in inner if entry(names)}
    hints = group_types(group, {**named, **{k: v for k, v in known.items() if isinstance(v, Mapping)}, **kinds})
    for names, value in inner:
        path = ".".join(("config", group, *names))
        hint = _hint(hints, names, path, paths) if hints else None
        if isinstance(value, str):
            value = _by_example(value, known, names) if hint is None else parse(value, hint)
        _put(tree, known, names, plain(value, path), path, keep_defaults=group != "model" or _is_dict(hints, names))
    return tree


def _hint(hints: Any, names: Sequence[str], path: str, paths: Sequence[str]) -> Any:
    """Declared type of the field; raises where there is none."""
    for name in names:
        if isinstance(hints, Mapping):
            if name not in hints:
                raise unknown_field(path, paths)
            hints = hints[name]
        elif (inside := _dict_values(hints)) is not None:
            hints = inside
        else:
            raise unknown_field(path, paths)
    return dict if isinstance(hints, Mapping) else hints


def _dict_values(hint: Any) -> Any:
    """Type of the values of a dict type (also of `dict | None`), else None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next((inside for arm in typing.get_args(hint) if (inside := _dict_values(arm)) is not None), None)
    if (typing.get_origin(hint) or hint) in (dict, Mapping):
        return (typing.get_args(hint) or (str, Any))[1]
    return Any if hint is Any else None


def _is_dict(hints: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether some field on the way is a dict rather than a group or an entry of one."""
    for name in names[:-1]:
        if not isinstance(hints, Mapping) or name not in hints:
            return False
        hints = hints[name]
    return not isinstance(hints, Mapping)


def _by_example(text: str, known: Any, names: Sequence[str]) -> Any:
    """Text of a field without a declared type: text where its value is text now, else what it looks like."""
    for name in names:
        known = known.get(name) if isinstance(known, Mapping) else None
    return parse(text, str) if isinstance(known, str) else guess(text.strip())


def _put(tree: dict[str, Any], known: Any, names: Sequence[str], value: Any, path: str, keep_defaults: bool) -> None:
    for name in names[:-1]:
        known = known.get(name) if isinstance(known, Mapping) else None
        if not isinstance(tree.get(name), Mapping):
            if tree.get(name) is not None:
                raise ValueError(f"{path} cannot be set: {name!r} is {tree[name]!r}, a value without fields")
            tree[name] = copy.deepcopy(dict(known)) if keep_defaults and isinstance(known, Mapping) else {}
        tree = tree[name]
    tree[names[-1]] = value
