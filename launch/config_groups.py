"""The groups of a config: who owns each, its defaults, and the types of its fields.

Six groups are one option class each. `model` and `loss` hold entries (a layer, a loss) of a class that the entry's name
or `kind` picks, so they have a function that completes them.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from lm.core.fields import build, defaults, field_types, fill

OPTION_CLASSES = {
    "optimizer": "lm.optim.options:OptimizerOptions",
    "data": "lm.data.options:DataOptions",
    "train": "lm.train.options:TrainOptions",
    "mesh": "lm.train.options:MeshOptions",
    "checkpoint": "lm.train.options:CheckpointOptions",
    "eval": "lm.eval.options:EvalOptions",
    "log": "lm.train.options:LogOptions",
}
GROUPS = ("model", "loss", *OPTION_CLASSES)


def option_class(group: str) -> type:
    """The option class of a group other than `model` and `loss`; imported here, so that `lm --help` stays quick."""
    module, name = OPTION_CLASSES[group].split(":")
    return getattr(importlib.import_module(module), name)


def resolve_group(group: str, given: Any) -> dict[str, Any]:
    """The complete group: what is given, checked, and defaults. Raises ValueError naming the field."""
    if not isinstance(given, Mapping):
        raise ValueError(f"config.{group} must be a group of fields; got {given!r} ({type(given).__name__})")
    if group == "model":
        from lm.models.build import resolve_model
        return resolve_model(given)
    if group == "loss":
        from lm.tasks.build import resolve_loss
        return resolve_loss(given)
    cls, where = option_class(group), f"config.{group}"
    build(cls, given, where)
    return fill(cls, given, where)


def known_group(group: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The group as far as it can be completed: overrides that are still to come may put right what is wrong in it."""
    try:
        return resolve_group(group, given)
    except ValueError:
        if group in OPTION_CLASSES:
            return {**defaults(option_class(group)), **given}
    if group == "loss":
        return {**resolve_group(group, {}), **given}
    from lm.layers import LAYERS
    from lm.models.build import ModelOptions
    from lm.models.depth_options import ENTRY, RecurrentDepthOptions
    out = {**defaults(ModelOptions), **given}
    if isinstance(out.get(ENTRY), Mapping):
        out[ENTRY] = {**defaults(RecurrentDepthOptions), **out[ENTRY]}
    for name in (name for name in used_entries(out) if isinstance(out.get(name, {}), Mapping)):
        kind = out.get(name, {}).get("kind", name)
        fields = {**dict.fromkeys(field_types(LAYERS[kind])), **defaults(LAYERS[kind])} if kind in LAYERS else {}
        out[name] = {"kind": kind, **fields, **out.get(name, {})}
    return out


def group_types(group: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Name to type of the group's own fields, and name to such a dict of each of the `entries` that has a class.

    `entries` is the group as it will be, as far as known: it decides which class an entry of the model has.
    """
    if group in OPTION_CLASSES:
        return dict(field_types(option_class(group)))
    if group == "model":
        from lm.layers import LAYERS
        from lm.models.build import ModelOptions
        from lm.models.depth_options import ENTRY, RecurrentDepthOptions
        kinds = {name: entry.get("kind", name) for name, entry in entries.items() if isinstance(entry, Mapping)}
        types = {name: {"kind": str, **field_types(LAYERS[kind])} for name, kind in kinds.items() if kind in LAYERS}
        # An entry that names a kind which does not exist keeps its fields: resolving it says what is wrong.
        unknown = {name: Any for name, kind in kinds.items() if kind not in LAYERS and "kind" in entries[name]}
        looped = {ENTRY: dict(field_types(RecurrentDepthOptions))} if ENTRY in entries else {}
        return {**types, **unknown, **looped, **field_types(ModelOptions)}
    return {}


def is_entry(name: str) -> bool:
    """Whether the model may have an entry of this name that no pattern names yet: a layer's, or the looped core's."""
    from lm.layers import LAYERS
    from lm.models.depth_options import ENTRY
    return name in LAYERS or name == ENTRY


def used_entries(model: Mapping[str, Any]) -> list[str]:
    """The layer entries that the model's blocks name; none where one of the lists is of a wrong type."""
    from lm.models.build import entry_names
    from lm.models.depth_options import ENTRY
    blocks = [model["prefix"], model["pattern"], (model.get(ENTRY) or {}).get("coda", ())]
    well_typed = all(isinstance(names, tuple) and all(isinstance(name, str) for name in names) for names in blocks)
    return entry_names(tuple(name for names in blocks for name in names)) if well_typed else []
