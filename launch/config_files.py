"""Reading a config: an experiment file with `get_config`, or the resolved config of a workdir. Writing it as JSON."""

import difflib
import hashlib
import importlib.util
import inspect
import json
import pathlib
import traceback
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from launch.config_overrides import flatten
from launch.config_values import plain

CONFIG_FILE = "config.json"
ABSENT = type("Absent", (), {"__repr__": lambda self: "(absent)"})()


def read(spec: str) -> dict[str, Any]:
    """The config as written, plain data without defaults.

    spec: "FILE.py" or "FILE.py:ARG" (calls `get_config(ARG)`), a config.json, or a workdir that holds one.
    Raises FileNotFoundError or ValueError with one line saying what is wrong with it.
    """
    path, arg = experiment_file(spec)
    if path is not None:
        made = _call(experiment_module(path).get_config, arg, spec)
        if not isinstance(made, (Mapping, ConfigDict)):
            raise ValueError(f"get_config of {spec} must return a ConfigDict or a dict; it returned "
                             f"{type(made).__name__}")
        return plain(made, "config")
    path = epath.Path(spec)
    path = path / CONFIG_FILE if path.is_dir() else path
    if not path.exists():
        if epath.Path(spec).is_dir():
            raise FileNotFoundError(f"{spec} is no workdir of a run: it has no {CONFIG_FILE}; check the path, or train "
                                    f"there first")
        raise _missing(spec)
    if path.suffix != ".json":
        raise ValueError(f"{spec} is no config: give an experiment FILE.py[:ARG], a config.json or a workdir")
    return from_json(path.read_text())


def _missing(spec: str) -> FileNotFoundError:
    path = pathlib.Path(spec)
    beside = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
    stems = {name.removesuffix(".py"): name for name in beside}  # `quickstart` for `quickstart.py`
    near = [stems.get(name, name) for name in difflib.get_close_matches(spec, [*beside, *stems], 1, 0.6)]
    return FileNotFoundError(f"there is no config {spec!r}; did you mean {near[0]!r}?" if near else
                             f"there is no config {spec!r}: give an experiment FILE.py[:ARG] or a workdir")


def experiment_file(spec: str) -> tuple[pathlib.Path | None, str | None]:
    """(file, argument) of "FILE.py" or "FILE.py:ARG"; no file for a config.json or a workdir."""
    head, colon, arg = spec.partition(".py:")
    if colon:
        return pathlib.Path(head + ".py"), arg
    return (pathlib.Path(spec) if spec.endswith(".py") else None), None


def experiment_module(path: pathlib.Path) -> Any:
    """What an experiment file defines, `get_config` at least. Raises FileNotFoundError or ValueError for the user."""
    if not path.is_file():
        raise _missing(str(path))
    module_spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise _user_error(path, error) from error
    if not callable(getattr(module, "get_config", None)):
        raise ValueError(f"{path} has no function get_config(); an experiment file must define one")
    return module


def _call(get_config: Any, arg: str | None, spec: str) -> Any:
    parameters = inspect.signature(get_config).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    if arg is not None and not positional:
        raise ValueError(f"get_config of {spec.partition(':')[0]} takes no argument; got {arg!r} after the colon")
    if arg is None and any(p.default is p.empty and p.kind is not p.VAR_POSITIONAL for p in positional):
        raise ValueError(f"get_config of {spec} needs an argument ({positional[0].name}): write {spec}:VALUE")
    try:
        return get_config(*() if arg is None else (arg,))
    except Exception as error:
        raise _user_error(pathlib.Path(inspect.getfile(get_config)), error) from error


def _user_error(path: pathlib.Path, error: Exception) -> ValueError:
    """What went wrong in the experiment file, with the line of that file."""
    if isinstance(error, SyntaxError):
        where, message = f"{error.filename} line {error.lineno}", error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename).absolute() == path.absolute()]
        where, message = f"{path} line {lines[-1] if lines else 1}", str(error)
    return ValueError(f"{where}: {type(error).__name__}: {message}")


def to_json(config: Any) -> str:
    """The config as JSON text: keys sorted, tuples as lists, ends with a newline."""
    return json.dumps(plain(config, "config"), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(text: str) -> dict[str, Any]:
    """The plain data that `to_json` wrote; lists become tuples. Raises ValueError where it is no config."""
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{CONFIG_FILE} is no JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{CONFIG_FILE} must hold an object with one entry a group; it holds a {type(tree).__name__}")
    return numbered(plain(tree, "config"))


def numbered(tree: dict[str, Any]) -> dict[str, Any]:
    """The config with the numbering of PEER's experts that it was written under. A resolved entry, which has its kind,
    says it since there are two; before that it was the grid, and read as shells its rows would be of other keys."""
    model = tree.get("model")
    entries = model.values() if isinstance(model, Mapping) else ()
    for entry in entries:
        if isinstance(entry, dict) and entry.get("kind") == "peer":
            entry.setdefault("numbering", "grid")
    return tree


def diff(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """(path, value in a, value in b) of every field that differs, sorted by path; `ABSENT` where one lacks it.

    1 and 1.0 differ, as True and 1 do: they are of another type.
    """
    left, right = flatten(plain(a, "config")), flatten(plain(b, "config"))
    out = []
    for path in sorted({*left, *right}):
        values = left.get(path, ABSENT), right.get(path, ABSENT)
        if ABSENT in values or _text(values[0]) != _text(values[1]):
            out.append((path, *values))
    return out


def _text(value: Any) -> str:
    """The value as text that is equal for equal values, whatever the order of keys."""
    return json.dumps(value, sort_keys=True)


def config_hash(config: Any) -> str:
    """Twelve hex digits that say whether two configs are the same, whatever the order of their keys."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:12]
