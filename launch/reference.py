"""Generates docs/config-reference.md from the option classes: `python -m launch.reference [--check]`."""

import argparse
import dataclasses
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

from launch.config_groups import GROUPS, OPTION_CLASSES, option_class
from launch.config_workdir import MAY_CHANGE
from lm.core.fields import field_types, type_name

PATH = pathlib.Path(__file__).resolve().parent.parent / "docs" / "config-reference.md"

HEAD = """\
# Config reference

Generated from the option classes by `python -m launch.reference`; a test fails when it is out of date.

A config is a Python file with `get_config()` that returns an `ml_collections.ConfigDict` or a dict of the groups below:
data only. Every field that the file leaves out has its default, and any can be set on the command line, which wins:

    lm train --config experiments/quickstart.py --config.train.steps=2000 --config.model.attention.window=None

| type | written as |
|---|---|
| `int`, `float` | `3`, `1_000`, `1e3` (an `int` too), `1e-3` |
| `bool` | `true`, `false`, `True`, `False`, `1`, `0` |
| `str` | as it is, without quotes; quotes around it are taken off: `'None'` is text where `None` would be allowed too |
| `X \\| None` | `None`, or an `X` |
| `tuple[...]` | `(1, 2)`, `[1, 2]`, or without brackets `a,b`; a single item may stand alone |
| `dict` | `{a: 1, b: (2, 3)}`, or one entry at a time: `--config.data.sources.books.weight=2` |
| a whole group | `--config.loss={next_token: 1, z_loss: 1e-4}` replaces the group |

`lm config --config FILE` prints the resolved config and its learning-rate schedule, `lm config diff A B` what differs
between two files or workdirs. `FILE.py:ARG` calls `get_config("ARG")`.
"""

LOSS = """\
A weighted sum: the name of a loss to its weight, or to a dict of `weight` and its fields. Where none is given it is
`next_token` with weight 1. `chunk: int | None` is the number of positions whose logits exist at a time; None chooses
by memory. `goldfish` is no loss: its fields, below, say which targets no loss sees ([goldfish.md](goldfish.md)); None,
the default, hides none. `load_balance` and `router_z` are reported by layers with a router (moe), see
[experts.md](experts.md). One of the preference losses makes the objective one of pairs
([preferences.md](preferences.md)); beside it `reference: str | None` says where the log-probabilities of the reference
model come from.
"""

ENTRIES = """\
Beside these fields stands one entry for each layer that `prefix` and `pattern` name, with the fields of its `kind`
(default: the entry's own name).
"""

WORKDIR = """\
## What may change in a workdir

A workdir belongs to one config. Starting it again with another one is refused with a table of the differences, unless
`--allow-config-change` is given. These fields may change without it; the change is logged:

| field | why |
|---|---|
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    return f"`{_cell(getattr(value, '__name__', repr(value)))}`"


def documentation(cls: type) -> dict[str, str]:
    """Field to its line: the metadata of `option`, else what the docstring of the class, or of a base that gives it
    the field, says after "name: "."""
    fields = {field.name: field.metadata.get("doc", "") for field in dataclasses.fields(cls)}
    names = "|".join(re.escape(name) for name in fields)
    described: dict[str, str] = {}
    owners = [base for base in cls.__mro__ if base is cls or fields.keys() & vars(base).get("__annotations__", {})]
    for owner in reversed(owners):
        text = " ".join((owner.__doc__ or "").split())
        parts = re.split(rf"(?<![\w.`])({names}): ", text) if names else [text]
        described |= {name: line.strip().removesuffix(".") for name, line in zip(parts[1::2], parts[2::2], strict=True)}
    return {name: doc or described.get(name, "") for name, doc in fields.items()}


def rows(cls: type) -> list[str]:
    """One line of a Markdown table a field: name, type, default, documentation."""
    types, lines = field_types(cls), documentation(cls)
    fields = [field for field in dataclasses.fields(cls) if field.name in types]
    return [f"| `{field.name}` | `{_cell(type_name(types[field.name]))}` | {_default(field)} | "
            f"{_cell(lines[field.name])} |" for field in fields]


def section(title: str, cls: type) -> str:
    """A heading, the first paragraph of the class's docstring, and the table of its fields."""
    summary = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    # A dataclass without a docstring gets its signature as one.
    summary = "" if summary.startswith(f"{cls.__name__}(") else f"{summary}\n\n"
    body = "\n".join(rows(cls))
    table = f"| field | type | default | |\n|---|---|---|---|\n{body}\n" if body else "No fields.\n"
    return f"{title}\n\n{summary}{table}"


def entries(classes: Mapping[str, Any], what: str) -> list[str]:
    """A section for each class, sorted by name; functions have no fields and are listed with their first line."""
    out = []
    for name, made in sorted(classes.items()):
        title = f"### {what} `{name}`"
        if isinstance(made, type) and dataclasses.is_dataclass(made):
            out.append(section(title, made))
        else:
            out.append(f"{title}\n\n{' '.join((made.__doc__ or '').split(chr(10) * 2)[0].split())}\n")
    return out


def generate() -> str:
    """The whole page."""
    from lm.core.goldfish import Goldfish
    from lm.eval.memorization_options import MemorizationOptions
    from lm.layers import LAYERS
    from lm.losses import LOSSES, TAUGHT
    from lm.losses.preference import PREFERENCE
    from lm.models.build import ModelOptions
    from lm.models.depth_options import ENTRY, RecurrentDepthOptions
    parts = [HEAD]
    for group in GROUPS:
        title = f"## config.{group}"
        if group == "model":
            parts += [section(title, ModelOptions), ENTRIES, *entries({ENTRY: RecurrentDepthOptions}, "entry"),
                      *entries(LAYERS, "layer")]
        elif group == "loss":
            parts += [f"{title}\n\n{LOSS}", *entries({**LOSSES, **TAUGHT}, "loss"),
                      *entries(PREFERENCE, "preference loss")]
            parts.append(section("### mask `goldfish`", Goldfish))
        else:
            parts.append(section(title, option_class(group)))
        if group == "eval":
            parts.append(section("### dict `memorization`", MemorizationOptions))
    allowed = "\n".join(f"| `{path}` | {_cell(why)} |" for path, why in MAY_CHANGE)
    return "\n".join([*parts, f"{WORKDIR}{allowed}\n"])


def main() -> int:
    """Writes the page, or with --check says whether it is current (exit code 1 where it is not)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page is out of date")
    if not parser.parse_args().check:
        PATH.write_text(generate())
        print(f"wrote {PATH.relative_to(PATH.parent.parent)}: {len(OPTION_CLASSES) + 2} groups")
        return 0
    if PATH.exists() and PATH.read_text() == generate():
        return 0
    print(f"{PATH.relative_to(PATH.parent.parent)} is out of date; run `python -m launch.reference`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
