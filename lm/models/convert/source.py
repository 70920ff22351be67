"""Weights as others publish them: found, read, and recognised, whatever their format."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lm.core.fields import did_you_mean
from lm.models.build import build_model
from lm.models.convert import blinkdl, ggmf, gguf_file, hf_rwkv, llama
from lm.models.convert.names import Layout, from_names
from lm.models.convert.safetensors_file import INDEX, SINGLE, read_folder, read_safetensors
from lm.models.convert.torch_file import read_torch

# model_type of a config.json -> the module that knows it.
FAMILIES = {"llama": llama, "rwkv": hf_rwkv}
HALVES = (np.dtype("<f2"), np.dtype(jnp.bfloat16))


class Weights(NamedTuple):
    """what: in words, for messages. model: the `model` group. layout, tensors: theirs. hf: the config.json, or {}.
    tokenizer: files by name that came with them (bytes). dtype: of the tensors, float32 where they differ."""

    what: str
    model: dict[str, Any]
    layout: Layout
    tensors: dict[str, np.ndarray]
    hf: Mapping[str, Any]
    tokenizer: Mapping[str, bytes]
    dtype: np.dtype

    def params(self) -> dict[str, Any]:
        """The tree {"params": ...}. Raises ValueError with all names that are missing, surplus or of another shape."""
        model = build_model(self.model, self.model["vocab_size"])
        return from_names(self.layout, self.tensors, model, self.what)


def read_weights(path: pathlib.Path) -> Weights:
    """The weights of a Hugging Face folder or of one file, by content: torch.save, safetensors, GGUF, rwkv.cpp.

    Raises FileNotFoundError or ValueError, with what to do, for what is absent, damaged, unsafe or not known.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        near = did_you_mean(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}{near}; nothing is downloaded here: give the "
                                f"place of the weights on this machine")
    with path.open("rb") as file:
        head = file.read(16)
    if head[:4] == gguf_file.MAGIC:
        hf, tensors, tokenizer = gguf_file.read_gguf(path)
        return _hugging_face(hf, tensors, tokenizer)
    if head[:4] == ggmf.MAGIC:
        found = _blinkdl(ggmf.read_ggmf(path), path)
        if "rwkv5" in found.model:
            found.model["rwkv5"]["norm_eps"] = ggmf.NORM_EPS
        return found
    if head[:2] == b"PK":
        return _blinkdl(read_torch(path), path)
    if head[8:9] == b"{":
        return _blinkdl(read_safetensors(path), path)
    raise ValueError(f"{path} begins with {head[:8]!r}: it is no file of torch.save (since torch 1.6), safetensors, "
                     f"GGUF or rwkv.cpp")


def _blinkdl(tensors: dict[str, np.ndarray], path: pathlib.Path) -> Weights:
    if not blinkdl.is_blinkdl(tensors):
        raise ValueError(f"{path} has tensors {', '.join(sorted(tensors)[:4])}, ... and no config.json: not an RWKV "
                         f"file; give the folder of a Hugging Face model, with its config.json")
    version, count = blinkdl.version_of(tensors), blinkdl.num_blocks(tensors)
    model = blinkdl.model_config(tensors)
    head_dim = model.get(f"rwkv{version}", {}).get("head_dim", 64)
    return Weights(blinkdl.NAMES[version], model, blinkdl.layout(version, count, head_dim),
                   blinkdl.split_mixes(tensors), {}, {}, _dtype(tensors))


def _folder(path: pathlib.Path) -> Weights:
    config = path / "config.json"
    if not config.is_file():
        raise ValueError(f"{path} has no config.json: give the folder of a Hugging Face model, or a file of weights")
    try:
        hf = json.loads(config.read_text())
        if not isinstance(hf, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise ValueError(f"{config} is no JSON object: {error}") from None
    if (path / SINGLE).is_file() or (path / INDEX).is_file():
        tensors = read_folder(path)
    elif (path / "pytorch_model.bin").is_file():
        tensors = read_torch(path / "pytorch_model.bin")
    else:
        raise ValueError(f"{path} has no {SINGLE}, no {INDEX} and no pytorch_model.bin")
    files = {name: (path / name).read_bytes() for name in TOKENIZER_FILES if (path / name).is_file()}
    return _hugging_face(hf, tensors, files)


# What may lie beside a model and belongs to its tokenizer, or to how text is drawn from it.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")


def _hugging_face(hf: Mapping[str, Any], tensors: dict[str, np.ndarray], files: Mapping[str, bytes]) -> Weights:
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"config.json: model_type={kind!r} is not known here; known: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    try:
        model, layout = family.model_config(hf), family.layout_of(hf)
    except KeyError as error:
        raise ValueError(f"config.json of a {kind!r} model lacks {error.args[0]!r}") from None
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"config.json of a {kind!r} model has a field of another kind than it should ({error})") \
            from None
    head = "lm_head.weight" if family is llama else "head.weight"
    table = next(entry.theirs for entry in layout.whole if entry.ours == "embed/embedding")
    if model["tie_embeddings"] and head in tensors and table in tensors:
        if not np.array_equal(tensors[head], tensors[table]):
            raise ValueError(f"config.json says tie_word_embeddings, but {head} differs from {table}")
        tensors = {name: value for name, value in tensors.items() if name != head}
    return Weights(family.ARCHITECTURE, model, layout, tensors, hf, files, _dtype(tensors))


def _dtype(tensors: Mapping[str, np.ndarray]) -> np.dtype:
    """The dtype of all tensors, float32 where there are several. Raises ValueError for one that is no float."""
    kinds = {value.dtype for value in tensors.values()}
    for name, value in tensors.items():
        if value.dtype != np.dtype("<f4") and value.dtype not in HALVES:
            raise ValueError(f"{name} is {value.dtype}; weights are float32, float16 or bfloat16 (quantised models: "
                             f"convert what they were made from)")
    return kinds.pop() if len(kinds) == 1 else np.dtype("<f4")
