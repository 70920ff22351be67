"""More experts for a trained PEER layer: n^2 become (n + delta)^2, and those that were there keep number and values.

The table and the sub-keys get rows at their end. While the new sub-keys wait (`peer.active_keys`), the model is the one
that it was, bit for bit.

Shape legend: L layers of a stack (left out where there is none), N experts, R rows of an expert, D embed_dim, n
sub-keys of a half, Q key_dim.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from lm.core.tree import map_named
from lm.layers.experts.numbering import to_shell
from lm.layers.experts.shards import EXPERT_AXIS

KIND = "peer"
NewKeys = Literal["near", "fresh"]
NOISE = 0.5  # of new sub-keys near old ones, in root mean squares of the old ones


def entry_to_grow(model: Mapping[str, Any], name: str | None) -> str:
    """The layer entry of the resolved `model` group that grows. Raises ValueError where there is none of PEER, or
    several and no name."""
    used = dict.fromkeys(part for block in (*model["prefix"], *model["pattern"]) for part in block.split("/"))
    found = [entry for entry in used if model[entry]["kind"] == KIND]
    if not found:
        kinds = ", ".join(f"{entry} (kind {model[entry]['kind']})" for entry in used)
        raise ValueError(f"the run has no layer of kind {KIND!r}, the one that can grow; its layers: {kinds}")
    if name is None and len(found) > 1:
        raise ValueError(f"the run has several layers of kind {KIND!r}; choose with --layer: {', '.join(found)}")
    if name is not None and name not in found:
        raise ValueError(f"the run has no layer {name!r} of kind {KIND!r}; it has {', '.join(found)}")
    return name or found[0]


def check_number(old: int, new: int, shards: int) -> None:
    """Raises ValueError, with the rule and the nearest number that will do, where `old` experts cannot become `new`,
    split over `shards`."""
    n = math.isqrt(old)
    fits = lambda m: m > n and m * m % shards == 0
    if fits(math.isqrt(max(new, 0))) and math.isqrt(new) ** 2 == new:
        return
    root = max(n + 1, math.isqrt(max(new, 0)))
    near = min((m for m in range(n + 1, root + shards + 2) if fits(m)), key=lambda m: (abs(m * m - new), m))
    if new <= old:
        rule = f"is no more than the {old} = {n}^2 experts that there are; experts are added, and none is taken away"
    elif math.isqrt(new) ** 2 != new:
        rule = "is not a square n * n, as product keys need"
    else:
        rule = f"is not divided by the mesh axis {EXPERT_AXIS}={shards}, over which experts are split"
    raise ValueError(f"--experts {new} {rule}; nearest: {near * near} = {near}^2")


def grow(variables: Any, model: Mapping[str, Any], entry: str, new: int, *, keys: NewKeys, seed: int) -> Any:
    """The variables (host arrays, as a checkpoint holds them) with `new` experts in every layer of that entry.

    An old expert keeps its shell number: of a layer that numbers i n + j the rows are put into that order first. New
    experts have input vectors as at initialisation and output vectors of 0, so that what they change at first is the
    share of the weight that they take. New sub-keys are near old ones drawn at random (`near`: they are chosen at once)
    or as large as they are and of any direction (`fresh`).
    """
    n, m = math.isqrt(model[entry]["num_experts"]), math.isqrt(new)
    rng = np.random.default_rng(seed)
    mine = re.compile(rf"(?:.*/)?{re.escape(entry)}(?:_\d+)?/(?P<leaf>experts|router/keys|usage/idle)")

    def one(name, leaf):
        match = mine.fullmatch(name)
        if match is None:
            return leaf
        if match["leaf"] == "router/keys":
            return append(leaf, new_keys(leaf, m - n, keys, rng), -2)
        axis = -3 if match["leaf"] == "experts" else -1
        rows = to_shell(leaf, n, axis) if model[entry]["numbering"] == "grid" else leaf
        if axis == -1:  # never chosen, and not for a moment
            return append(rows, np.zeros((*rows.shape[:-1], new - n * n), rows.dtype), -1)
        made = rng.normal(0, rows.shape[-1] ** -0.5, (*rows.shape[:-3], new - n * n, *rows.shape[-2:]))
        made[..., 1, :] = 0
        return append(rows, made, -3)

    return map_named(one, variables)


def append(old: np.ndarray, new: np.ndarray, axis: int) -> np.ndarray:
    """Both along the axis, in the dtype of the old."""
    return np.concatenate([old, new.astype(old.dtype)], axis)


def new_keys(old: np.ndarray, count: int, kind: NewKeys, rng: np.random.Generator) -> np.ndarray:
    """[..., count, Q / 2] beside sub-keys [..., n, Q / 2]."""
    size = np.sqrt(np.mean(np.square(old), (-2, -1), keepdims=True))
    drawn = size * rng.normal(size=(*old.shape[:-2], count, old.shape[-1]))
    if kind == "fresh":
        return drawn
    return old[..., rng.integers(old.shape[-2], size=count), :] + NOISE * drawn


def freezing(model: Mapping[str, Any], entry: str, what: str) -> list[dict[str, Any]]:
    """Rules for `config.optimizer.rules`. what: none; experts (the old experts and sub-keys); router (its queries too);
    rest (everything but the new experts and sub-keys). model: before it grows."""
    count, layer = model[entry]["num_experts"], rf"(^|/){re.escape(entry)}(_\d+)?/"
    rules = [{"match": f"{layer}experts$", "freeze_first": (count, -3)},
             {"match": f"{layer}router/keys$", "freeze_first": (math.isqrt(count), -2)}]
    more = {"router": {"match": f"{layer}router/(query/kernel|scale|bias)$", "freeze": True},
            "rest": {"match": f"^(?!.*{layer}(experts|router/keys)$)", "freeze": True}}
    return [] if what == "none" else [*rules, *([more[what]] if what in more else [])]
