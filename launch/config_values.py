"""Values of a config: what counts as data, and how the text of an override becomes a value of a field's type."""

import ast
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from lm.core.fields import conform

_OPEN, _CLOSE = "([{", ")]}"
_WORDS = {"none": None, "null": None, "true": True, "false": False}
_SEQUENCES = (tuple, list, Sequence)


def plain(value: Any, path: str) -> Any:
    """`value` as plain data: dicts with text keys, tuples, numbers, text, booleans, None.

    Lists become tuples, scalars of numpy become Python's. Raises ValueError naming `path` for anything else: what a
    config holds must survive being written as JSON and read again.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ValueError(f"{path} is {value}, which JSON cannot hold; use a finite number, or None for no limit")
        return value
    if isinstance(value, (Mapping, ConfigDict)):
        out = {}
        for key in value:
            if type(key) is not str:
                raise ValueError(f"{path} has the key {key!r} ({type(key).__name__}); keys must be text")
            out[key] = plain(_item(value, key, path), f"{path}.{key}")
        return out
    if isinstance(value, (tuple, list)):
        return tuple(plain(item, f"{path}[{n}]") for n, item in enumerate(value))
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain(value.item(), path)
    kind = "an array" if hasattr(value, "shape") else f"a {type(value).__name__}"
    raise ValueError(f"{path} is {kind}; a config holds data only (numbers, text, booleans, None, tuples, dicts): name "
                     f"what is meant by a string, or build it in the code that reads the config")


def _item(value: Any, key: str, path: str) -> Any:
    try:
        return value[key]
    except RequiredValueError:
        raise ValueError(f"{path}.{key} is a placeholder without a value; give it one in get_config") from None


def split(text: str, separator: str) -> list[str] | None:
    """`text` cut at separators outside quotes and brackets, or None where the brackets or quotes do not match."""
    parts, start, stack, quote, skip = [], 0, [], "", False
    for n, char in enumerate(text):
        if skip:
            skip = False
        elif quote:
            quote = "" if char == quote else quote
            skip = char == "\\"
        elif char in "\"'":
            quote = char
        elif char in _OPEN:
            stack.append(_CLOSE[_OPEN.index(char)])
        elif char in _CLOSE:
            if not stack or stack.pop() != char:
                return None
        elif char == separator and not stack:
            parts.append(text[start:n])
            start = n + 1
    if stack or quote:
        return None
    parts = [part.strip() for part in (*parts, text[start:])]
    return parts[:-1] if not parts[-1] else parts


def _bracketed(text: str, brackets: str) -> list[str] | None:
    """Items between the brackets that enclose the whole of `text`, else None."""
    if len(text) < 2 or text[0] not in brackets or text[-1] != _CLOSE[_OPEN.index(text[0])]:
        return None
    return split(text[1:-1], ",")


def _unquoted(text: str) -> str | None:
    if len(text) < 2 or text[0] not in "\"'" or text[-1] != text[0]:
        return None
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return None


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None


def _dict(items: list[str], hint: Any) -> dict[str, Any] | None:
    arms, out = typing.get_args(hint), {}
    for item in items:
        pair = split(item, ":")
        if not pair or len(pair) < 2:
            return None
        key = _unquoted(pair[0])
        out[pair[0] if key is None else key] = parse(":".join(pair[1:]), arms[1] if arms else Any)
    return out


def guess(text: str) -> Any:
    """The value that `text` stands for where no type is declared: None, a boolean, a number, quoted text, a tuple in
    brackets, a dict in braces; else the text itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for value in (_number(text), _unquoted(text)):
        if value is not None:
            return value
    if (items := _bracketed(text, "([")) is not None:
        return tuple(guess(item) for item in items)
    if (items := _bracketed(text, "{")) is not None and (made := _dict(items, Any)) is not None:
        return made
    return text


def parse(text: str, hint: Any = Any) -> Any:
    """The value that the text of an override stands for, in a field of type `hint`.

    Text of a `str` field stays as it is; a tuple may do without brackets and its words without quotes. Where the text
    does not fit the type, what it looks like is returned, so that the check of the field words the error.
    """
    origin, arms, stripped = typing.get_origin(hint), typing.get_args(hint), text.strip()
    if hint is str:
        unquoted = _unquoted(stripped)
        return text if unquoted is None else unquoted
    if origin in (typing.Union, types.UnionType):
        return _parse_union(text, arms)
    if origin is typing.Literal:
        return stripped if stripped in arms else guess(stripped)
    if hint is bool and stripped in ("0", "1"):
        return stripped == "1"
    if origin in _SEQUENCES or hint in _SEQUENCES:
        items = _bracketed(stripped, "([")
        items = split(stripped, ",") if items is None else items
        if items is None:
            return text
        each = arms if len(arms) == len(items) and Ellipsis not in arms else (arms[:1] or (Any,)) * len(items)
        return tuple(parse(item, arm) for item, arm in zip(items, each, strict=True))
    if (origin in (dict, Mapping) or hint in (dict, Mapping)) and (items := _bracketed(stripped, "{")) is not None:
        made = _dict(items, hint)
        return text if made is None else made
    return guess(stripped)


def _parse_union(text: str, arms: tuple[Any, ...]) -> Any:
    bare_text = str in arms and not text.strip().startswith(tuple(_OPEN))
    # Text last, since everything is text; a tuple needs its brackets where bare text is allowed too.
    for arm in (a for a in arms if a is not str):
        if bare_text and (typing.get_origin(arm) or arm) in _SEQUENCES:
            continue
        try:
            return conform(parse(text, arm), arm)
        except TypeError:
            pass
    return parse(text, str) if str in arms else guess(text.strip())
