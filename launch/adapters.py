"""What a config trains beside a frozen model: low-rank adapters, initial states, or both."""

import dataclasses
from typing import Any

from lm.data.synthetic import TASKS

SINGLE = "single"
FROZEN = {"match": r"^(?!lora/|state/|memory/)", "freeze": True}  # what a feedback memory starts from is always new


def used(train: Any) -> bool:
    """Whether these options of the group `train` leave the model's own parameters as they are."""
    return train.lora_rank is not None or train.state_tuning


def rules(train: Any, optimizer: Any) -> Any:
    """The optimizer's options for these: the model itself is frozen, and `a` of every adapter, of which the factor
    lora_alpha / lora_rank is a part, takes steps that are as much larger."""
    after: tuple[dict[str, Any], ...] = ()
    factor = 1.0 if train.lora_alpha is None or train.lora_rank is None else train.lora_alpha / train.lora_rank
    if factor != 1.0:
        # A step of sgd is as large as the gradient, which is smaller by the factor.
        after = ({"match": r"^lora/.*/a$", "lr_multiplier": factor**2 if optimizer.name == "sgd" else factor,
                  "weight_decay": optimizer.weight_decay / factor**(2 if optimizer.name == "sgd" else 1)},)
    return dataclasses.replace(optimizer, rules=(FROZEN, *optimizer.rules, *after))


def beside(train: Any, model: Any, params: Any, key: Any) -> dict[str, Any]:
    """The collections beside `params`: {"lora": ...}, {"state": ...}, both or none. params: arrays or shapes.

    Raises ValueError where the model has nothing that the options could train.
    """
    out = {}
    if train.lora_rank is not None:
        from lm.adapters.lora import init_lora
        out["lora"] = init_lora(key, params, train.lora_rank, train.lora_match, train.lora_alpha, train.dora)
    if train.state_tuning:
        from lm.models.state_tuning import init_states
        out["state"] = init_states(model)
    return out


def check(train: Any, data: Any) -> None:
    """Raises ValueError where a learned initial state would meet documents that start inside a row."""
    if not train.state_tuning:
        return
    if data.kind in TASKS and not data.sources:
        for where, part in {"data": data, **{f"data.{name}": p for name, p in data.validation_part().items()}}.items():
            if part.task.get("length") is not None:
                raise ValueError(f"config.train.state_tuning needs one word a row, and config.{where}.task.length="
                                 f"{part.task['length']} puts several into one; leave it out")
    elif data.packing != SINGLE:
        raise ValueError(f"config.train.state_tuning starts every document from the learned state, which the recurrent "
                         f"operations can do at the start of a row alone, and config.data.packing={data.packing!r} "
                         f"puts several documents into a row; set data.packing={SINGLE!r}")
