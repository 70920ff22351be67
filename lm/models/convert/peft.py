"""Adapters under the names of Hugging Face's PEFT: adapter_config.json and the tensors of adapter_model.safetensors."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lm.core.tree import named_leaves
from lm.models.convert.names import Layout

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Our leaf, and the end of their name.
_LEAVES = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def to_peft(layout: Layout, lora: Mapping[str, Any], vocab_size: int,
            cast: Callable[[np.ndarray], np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(adapter_config.json, tensors) of the adapters `lora` of a model with this layout.

    Theirs multiply by lora_alpha / r, which our `a` holds already: lora_alpha is r. Raises ValueError for an adapter of
    a kernel that is no matrix of its own in their model.
    """
    leaves, used, tensors = named_leaves(lora), set(), {}

    def put(ours: str, theirs: str, layer: int | None, table: bool) -> None:
        for leaf, end in _LEAVES.items():
            name = f"{ours.removesuffix('kernel')}{leaf}"
            if name not in leaves:
                continue
            used.add(name)
            value = np.asarray(leaves[name] if layer is None else leaves[name][layer])
            value = value.T if leaf != "magnitude" else value
            value = value[:vocab_size] if table and leaf != "a" else value
            tensors[f"base_model.model.{theirs.removesuffix('weight')}{end}"] = np.ascontiguousarray(cast(value))

    for entry in layout.whole:
        if entry.ours.endswith("/kernel"):
            put(entry.ours, entry.theirs, None, entry.table)
    for n, block in enumerate(layout.blocks):
        for entry in block:
            if entry.ours.endswith("/kernel") and entry.transposed:
                prefix = n < layout.prefix
                put(f"stack/{f'prefix_{n}' if prefix else 'pattern_0'}/{entry.ours}", entry.theirs,
                    None if prefix else n - layout.prefix, False)
    if lost := sorted(set(leaves) - used):
        others = " and others" if lost[3:] else ""
        raise ValueError(f"PEFT has no place for the adapters {', '.join(lost[:3])}{others}; use --merge with --to hf")
    ranks = {leaf.shape[-1] for name, leaf in leaves.items() if name.endswith("/a")}
    modules = sorted({name.split(".")[-3] for name in tensors if name.endswith(_LEAVES["a"])})
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": max(ranks), "lora_alpha": max(ranks),
            "target_modules": modules, "use_dora": any(name.endswith("/magnitude") for name in leaves),
            "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
            "base_model_name_or_path": None}, tensors
