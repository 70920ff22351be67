"""The space that a sweep searches: which fields of the config vary, over what, and under which condition.

As data, in an experiment's `sweep()` or read from `--param PATH=TEXT`:

    {"optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},       loguniform(1e-4,1e-2)
     "model.num_layers": {"low": 2, "high": 8},                                 int(2,8)
     "model.mlp.activation": ["gelu", "swiglu"],                                gelu,swiglu
     "model.embed_dim,model.num_layers": [(64, 4), (128, 2)],                   (64,4),(128,2)
     "optimizer.momentum": {"low": 0.8, "high": 0.99, "when": {"optimizer.name": "sgd"}}}

A key of several paths gives them values together (a zip).
"""

import ast
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm.core.fields import check_known

_CALL = re.compile(r"(?P<name>[a-z]+)\((?P<args>.*)\)", re.DOTALL)
_RANGES = {"uniform": (False, False), "loguniform": (True, False), "int": (False, True), "logint": (True, True)}


class Parameter(NamedTuple):
    """One thing that varies. values: choices, or None for a range. when: path to the value that it depends on."""

    paths: tuple[str, ...]
    values: tuple[Any, ...] | None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False
    when: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """As the study knows it."""
        return ",".join(self.paths)

    def label(self, value: Any) -> Any:
        """A choice as studies store it: numbers, words and None as they are, others as they are written."""
        return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def read_space(given: Mapping[str, Any]) -> list[Parameter]:
    """Parameters of a mapping as above, those that others depend on first. Raises ValueError naming what is wrong."""
    space = [_parameter(key, value) for key, value in given.items()]
    paths = [path for parameter in space for path in parameter.paths]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"the sweep gives {twice!r} values twice")
    ordered: list[Parameter] = []
    while len(ordered) < len(space):
        known = {path for parameter in ordered for path in parameter.paths}
        ready = [p for p in space if p not in ordered and all(path in known for path, _ in p.when)]
        if not ready:
            stuck = next(p for p in space if p not in ordered)
            raise ValueError(f"{stuck.name!r} depends on {', '.join(path for path, _ in stuck.when)}, which the sweep "
                             f"does not vary before it; it varies {', '.join(paths)}")
        ordered += ready
    return ordered


def _parameter(key: str, given: Any) -> Parameter:
    paths = tuple(path.strip().removeprefix("config.") for path in key.split(","))
    if not all(path.count(".") for path in paths):
        raise ValueError(f"{key!r} must be a field of the config, GROUP.FIELD, or several with commas between")
    when: tuple[tuple[str, Any], ...] = ()
    if isinstance(given, Mapping):
        check_known(given, ("low", "high", "log", "integer", "values", "when"), f"the sweep's {key!r}", "entry")
        when = tuple((path.removeprefix("config."), value) for path, value in given.get("when", {}).items())
        if "values" not in given:
            return _range(key, paths, given, when)
        given = given["values"]
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(f"{key!r} must have a list of values, or low and high; got {given!r}")
    values = tuple(tuple(value) if isinstance(value, list) else value for value in given)
    wrong = [value for value in values if len(paths) > 1 and (not isinstance(value, tuple) or len(value) != len(paths))]
    if wrong:
        raise ValueError(f"{key!r} names {len(paths)} fields, so each value must be {len(paths)} values; got "
                         f"{wrong[0]!r}")
    return Parameter(paths, values, when=when)


def _range(key: str, paths: tuple[str, ...], given: Mapping[str, Any], when: Any) -> Parameter:
    low, high, log = given.get("low"), given.get("high"), bool(given.get("log", False))
    for name, value in (("low", low), ("high", high)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{key!r} needs {name}, a number; got {value!r}")
    integer = bool(given.get("integer", isinstance(low, int) and isinstance(high, int)))
    if len(paths) > 1:
        raise ValueError(f"{key!r} names several fields, which can have values only together, in a list")
    if low >= high or (log and low <= 0):
        raise ValueError(f"{key!r} must go from a lower to a higher number{', above 0 as it is logarithmic' * log}; "
                         f"got {low} to {high}")
    return Parameter(paths, None, low, high, log, integer, when)


def parse_text(text: str) -> Any:
    """The data of `loguniform(a,b)`, `uniform(a,b)`, `int(a,b)`, `logint(a,b)`, or of values with commas between."""
    match = _CALL.fullmatch(text.strip())
    if match:
        check_known([match["name"]], _RANGES, "--param", "range")
        log, integer = _RANGES[match["name"]]
        try:
            low, high = (float(part) for part in match["args"].split(","))
        except ValueError:
            raise ValueError(f"--param {text!r}: {match['name']} takes two numbers, low and high") from None
        if integer and not (low.is_integer() and high.is_integer()):
            raise ValueError(f"--param {text!r}: {match['name']} takes two whole numbers")
        return {"low": int(low) if integer else low, "high": int(high) if integer else high, "log": log,
                "integer": integer}
    return [_literal(part) for part in _split(text)]


def _split(text: str) -> list[str]:
    """The parts between commas that are in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def suggest(trial: Any, space: Sequence[Parameter]) -> dict[str, Any]:
    """Path to value of everything that varies in this Optuna trial."""
    out: dict[str, Any] = {}
    for parameter in space:
        if any(path not in out or out[path] != value for path, value in parameter.when):
            continue
        if parameter.values is not None:
            labels = {parameter.label(value): value for value in parameter.values}
            value = labels[trial.suggest_categorical(parameter.name, list(labels))]
        elif parameter.integer:
            value = trial.suggest_int(parameter.name, int(parameter.low), int(parameter.high), log=parameter.log)
        else:
            value = trial.suggest_float(parameter.name, parameter.low, parameter.high, log=parameter.log)
        out.update(zip(parameter.paths, value if len(parameter.paths) > 1 else (value,), strict=True))
    return out


def grid(space: Sequence[Parameter]) -> list[dict[str, Any]]:
    """Name to stored value of every combination. Raises ValueError where something is a range."""
    ranges = [parameter.name for parameter in space if parameter.values is None]
    if ranges:
        raise ValueError(f"a grid needs lists of values, and {', '.join(ranges)} is a range; choose another --sampler")
    out: list[dict[str, Any]] = []
    for values in itertools.product(*(parameter.values for parameter in space)):
        chosen: dict[str, Any] = {}
        at: dict[str, Any] = {}
        for parameter, value in zip(space, values, strict=True):
            if all(path in at and at[path] == wanted for path, wanted in parameter.when):
                chosen[parameter.name] = parameter.label(value)
                at.update(zip(parameter.paths, value if len(parameter.paths) > 1 else (value,), strict=True))
        if chosen not in out:  # of values that only differ in what does not apply, one
            out.append(chosen)
    return out


def text_of(value: Any) -> str:
    """A value as an override of the config."""
    return value if isinstance(value, str) else repr(value)


def examples(space: Sequence[Parameter]) -> list[list[tuple[str, str]]]:
    """Overrides that together touch every value and both ends of every range: what has to resolve before a start."""
    out = []
    for parameter in space:
        for value in parameter.values or (parameter.low, parameter.high):
            value = int(value) if parameter.values is None and parameter.integer else value
            several = value if len(parameter.paths) > 1 else (value,)
            out.append([*((path, text_of(wanted)) for path, wanted in parameter.when),
                        *((path, text_of(v)) for path, v in zip(parameter.paths, several, strict=True))])
    return out
