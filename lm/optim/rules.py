"""What is done to each parameter: rules by regular expression, resolved into one row a parameter.

Each thing that can be said (`optimizer`, `weight_decay`, `lr_multiplier`, `freeze`, `freeze_first`) is decided by the
first rule, in order, that matches the name and says it. The user's rules come first and the defaults below last, so
every parameter is covered, and a user's rule that only sets a multiplier leaves the rest to the defaults.
"""

import dataclasses
import difflib
import math
import re
from typing import Any

from lm.core.tree import STATS, is_stacked, named_leaves
from lm.optim.options import WHERE, OptimizerOptions


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter. `shape` is the stored one; `layers` is its leading axis of stacked layers, 0 without one.
    The peak learning rate is that of the optimizer times `lr_multiplier`. Of `held` = (count, axis) the first `count`
    places of that axis, counted from the last, stay as they are."""

    name: str
    shape: tuple[int, ...]
    layers: int
    optimizer: str
    lr_multiplier: float
    weight_decay: float
    frozen: bool
    held: tuple[int, int] | None = None

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of the parameter of one layer."""
        return self.shape[1:] if self.layers else self.shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def trainable(self) -> int:
        """Number of elements that training changes."""
        if self.held is None:
            return 0 if self.frozen else self.size
        count, axis = self.held
        return 0 if self.frozen else self.size - self.size // self.shape[axis] * count


# Running statistics are moved by the train step; no rule of a user's makes parameters of them.
RUNNING = {"match": rf"^{STATS}/", "freeze": True}


def default_rules(options: OptimizerOptions) -> tuple[dict[str, Any], ...]:
    """The rules after the user's. `ndim` counts the dimensions of one layer's parameter, the stacked axis left out.

    Only leaves called `kernel`, and adapters, are matrices that multiply activations: those decay, and of them muon
    takes the hidden ones. A two-dimensional leaf of another name (mixing coefficients, tables of experts) does not
    decay and goes to adamw under muon, unless a rule says otherwise.
    """
    other = "adamw" if options.name == "muon" else options.name
    matrix, embedding = options.weight_decay, options.weight_decay if options.decay_embeddings else 0.0
    return (
        {"match": r"^lora/", "ndim": (2,), "optimizer": other, "weight_decay": matrix},
        {"match": r"(^|/)embedding$", "optimizer": other, "weight_decay": embedding},
        {"match": r"^head/kernel$", "optimizer": other, "weight_decay": matrix},
        {"match": r"(^|/)kernel$", "ndim": (2,), "optimizer": options.name, "weight_decay": matrix},
        {"match": r"(^|/)kernel$", "ndim": (3, 4), "optimizer": other, "weight_decay": matrix},
        {"match": r"(^|/)experts_(up|gate|down)$", "optimizer": other, "weight_decay": matrix},
        {"match": r"", "optimizer": other, "weight_decay": 0.0, "lr_multiplier": 1.0, "freeze": False},
    )


def table(options: OptimizerOptions, params_shapes: Any) -> tuple[Row, ...]:
    """The row of every parameter, in tree order.

    Raises ValueError for a user's rule that matches no parameter (naming the nearest names), for muon on a parameter
    that is no matrix, and where nothing is left to train.
    """
    if options.parametrization != "standard":
        raise ValueError(f"{WHERE}.parametrization={options.parametrization!r} depends on the model's axes; resolve it "
                         f"with lm.optim.mup.resolve first")
    leaves = named_leaves(params_shapes)
    for index, rule in enumerate(options.rules):
        if not any(re.search(rule["match"], name) for name in leaves):
            near = difflib.get_close_matches(re.sub(r"[^\w/]", "", rule["match"]), leaves, n=3, cutoff=0.0)
            raise ValueError(f"{WHERE}.rules[{index}] matches no parameter: {rule['match']!r}; the nearest are "
                             f"{', '.join(near)}")
    rules = (RUNNING, *options.rules, *default_rules(options))
    rows = tuple(_row(options, rules, name, tuple(leaf.shape)) for name, leaf in leaves.items())
    if all(row.frozen for row in rows):
        raise ValueError(f"{WHERE}.rules freeze all {len(rows)} parameters; nothing is left to train")
    return rows


def _row(options: OptimizerOptions, rules: tuple[dict[str, Any], ...], name: str, shape: tuple[int, ...]) -> Row:
    layers = shape[0] if is_stacked(name) else 0
    ndim = len(shape) - bool(layers)
    said: dict[str, Any] = {}
    for rule in rules:
        if ndim in rule.get("ndim", (ndim,)) and re.search(rule["match"], name):
            said = {**rule, **said}
    if said["optimizer"] == "muon" and ndim < 2:
        raise ValueError(f"{WHERE}.rules give muon to {name} of shape {shape}, which is no matrix; muon needs at least "
                         "two dimensions a layer: use 'adamw' there")
    multiplier = float(said["lr_multiplier"])
    if said["optimizer"] == "adamw" != options.name and options.adam_learning_rate is not None:
        multiplier *= options.adam_learning_rate / options.learning_rate
    return Row(name, shape, layers, said["optimizer"], multiplier, float(said["weight_decay"]), bool(said["freeze"]),
               _held(name, shape[bool(layers):], said.get("freeze_first")))


def _held(name: str, shape: tuple[int, ...], first: tuple[int, int] | None) -> tuple[int, int] | None:
    """What is held of a parameter; None where that is nothing. Raises ValueError for more than there is."""
    if first is None or not first[0]:
        return None
    count, axis = first
    if -axis > len(shape) or count > shape[axis]:
        raise ValueError(f"{WHERE}.rules freeze the first {count} places of axis {axis} of {name}, whose shape is "
                         f"{shape}; it has " + (f"{shape[axis]} of them" if -axis <= len(shape) else
                                                f"axes -1 to {-len(shape)}"))
    return int(count), int(axis)


def format_table(rows: tuple[Row, ...]) -> str:
    """The rows as aligned text for parameters.txt, with the totals in the last line."""
    cells = [("name", "shape", "size", "optimizer", "lr x", "decay", "")]
    for row in rows:
        shape = "x".join(map(str, row.shape)) or "scalar"
        how = ("frozen", "-", "-") if row.frozen else (row.optimizer, f"{row.lr_multiplier:g}", f"{row.weight_decay:g}")
        cells.append((row.name, shape, f"{row.size:,}", *how, f"first {row.held[0]} frozen" if row.held else ""))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    trainable = sum(row.trainable for row in rows)
    return "\n".join([*lines, f"{sum(row.size for row in rows):,} parameters, {trainable:,} trainable"]) + "\n"
