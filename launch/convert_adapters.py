"""Adapters out of a run: alone, as PEFT loads them, or added to the weights of a new run."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from launch import config as configs
from lm.models.convert import peft
from lm.models.convert.safetensors_file import write_safetensors
from lm.models.convert.target import Cast, layout_of_hugging_face
from lm.train.checkpoint import open_checkpoints
from lm.train.options import CheckpointOptions

# What a run without adapters says of them.
WITHOUT = {"train.lora_rank": None, "train.lora_alpha": None, "train.dora": False, "train.init_from": None}


def split(params: dict[str, Any], merge: bool, alone: bool, workdir: str) -> tuple[dict[str, Any], Any]:
    """(variables without adapters, adapters): added to the weights with `merge`, by themselves with `alone`.

    Raises ValueError for adapters that the caller neither wants added nor alone, for what has to be added and is not
    there, and for learned initial states, for which others have no names.
    """
    if "state" in params:
        raise ValueError(f"{workdir} holds learned initial states beside its weights, for which others have no names; "
                         f"convert the run that it started from (config.train.init_from)")
    lora = params.get("lora")
    if lora is None and (merge or alone):
        raise ValueError(f"{workdir} holds no adapters (config.train.lora_rank); leave out "
                         f"{'--merge' if merge else '--to peft'}")
    if lora is not None and not (merge or alone):
        raise ValueError(f"{workdir} holds adapters beside its weights; --merge adds them to the weights, --to peft "
                         f"writes them alone")
    rest = {name: tree for name, tree in params.items() if name != "lora"}
    if merge:
        from lm.adapters.lora import merge as merged
        rest["params"] = merged(rest["params"], lora)
    return rest, lora


def write_peft(folder: pathlib.Path, group: Mapping[str, Any], lora: Any, vocab: int, longest: int, cast: Cast) -> int:
    """Writes the two files that PEFT reads; returns the number of tensors."""
    _, layout = layout_of_hugging_face(group, vocab, longest)
    settings, tensors = peft.to_peft(layout, lora, vocab, cast)
    folder.mkdir()
    (folder / peft.CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    write_safetensors(folder / peft.TENSORS, tensors)
    return len(tensors)


def write_run(folder: pathlib.Path, config: Any, params: Any, note: Mapping[str, Any]) -> None:
    """A workdir of its own whose only checkpoint, step 0, holds these variables. note: where the weights came from."""
    from launch.convert_in import SOURCE_FILE
    with config.unlocked():
        for path, value in WITHOUT.items():
            group, field = path.split(".")
            config[group][field] = value
    folder.mkdir()
    with open_checkpoints(folder, CheckpointOptions()) as checkpoints:
        checkpoints.save(0, {"params": params}, {})
    (folder / configs.CONFIG_FILE).write_text(configs.to_json(config))
    if note:
        (folder / SOURCE_FILE).write_text(json.dumps(note, indent=2) + "\n")
