"""From a run to the folder that transformers or PEFT loads, to a file with BlinkDL's names, or to a run."""

import argparse
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from launch import config as configs
from launch.config_workdir import check_place
from launch.convert_adapters import split, write_peft, write_run
from launch.convert_in import SOURCE_FILE, staged
from lm.core.tree import num_params
from lm.data.corpora import load_tokenizer
from lm.data.huggingface import HuggingFace
from lm.models.build import build_model
from lm.models.convert.safetensors_file import SINGLE, package, write_safetensors
from lm.models.convert.source import TOKENIZER_FILES
from lm.models.convert.target import to_blinkdl, to_hugging_face
from lm.train.checkpoint import restore_params

DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype(jnp.bfloat16)}


def write_out(args: argparse.Namespace) -> str:
    """Writes the checkpoint and returns what was done, in words. Nothing is left behind where it fails."""
    package()
    check_place(args.workdir)
    config = configs.load(args.workdir, args.overrides)
    source = source_of(args.workdir, config)
    tokenizer = load_tokenizer(configs.options(config, "data"))
    group = config.model.to_dict()
    vocab = build_model(group, tokenizer.vocab_size).vocab_size
    dtype = args.dtype or source.get("dtype", "float32")
    out = pathlib.Path(args.out).expanduser().absolute()
    note = ""
    with staged(out) as stage:
        params, step = restore_params(args.workdir, None, args.step, ema=args.ema)
        params, lora = split(params, args.merge, args.to == "peft", args.workdir)
        if args.to == "peft":
            count = write_peft(stage, group, lora, vocab, config.train.seq_len, cast(dtype))
            return (f"step {step} of {args.workdir}: {num_params(lora):,} parameters of adapters in {count} tensors, "
                    f"{dtype} -> {args.out}")
        if args.to == "run":
            write_run(stage, config, params, source)
            return (f"step {step} of {args.workdir}: {num_params(params):,} parameters, adapters added, float32 -> "
                    f"{args.out}")
        if args.to == "blinkdl":
            tensors = to_blinkdl(group, params, vocab, cast(dtype))
            write_safetensors(stage, tensors)
        else:
            hf = source.get("config", {})
            longest = hf.get("max_position_embeddings") or hf.get("context_length") or config.train.seq_len
            made, tensors = to_hugging_face(group, params, vocab, longest, cast(dtype))
            special = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos")}
            special = {name: value for name, value in special.items() if value is not None and name not in hf}
            stage.mkdir()
            (stage / "config.json").write_text(json.dumps({**hf, **made, **special, "dtype": dtype}, indent=2) + "\n")
            files = tokenizer_files(tokenizer)
            for name, data in files.items():
                (stage / name).write_bytes(data)
            if not files:
                note = f" (without a tokenizer: transformers has none like {type(tokenizer).__name__})"
            write_safetensors(stage / SINGLE, tensors)
    return (f"step {step} of {args.workdir}: {num_params(params):,} parameters in {len(tensors)} tensors, {dtype} -> "
            f"{args.out}{note}")


def source_of(workdir: str, config: Any) -> dict[str, Any]:
    """What `lm convert` noted about where the weights of this run came from, or those of the run that it began with."""
    for place in (workdir, config.train.init_from):
        path = pathlib.Path(place or "") / SOURCE_FILE
        if place and path.is_file():
            return json.loads(path.read_text())
    return {}


def cast(name: str) -> Any:
    """float32 arrays to that dtype. Raises ValueError for values that become infinite in it."""
    dtype = DTYPES[name]

    def to(value: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            made = value.astype(dtype)
        if np.isfinite(value).all() and not np.isfinite(made.astype(np.float32)).all():
            raise ValueError(f"weights as large as {np.abs(value).max():.3g} do not fit --dtype {name}; use bfloat16 "
                             f"or float32")
        return made
    return to


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files that transformers reads, by name; nothing for a tokenizer that it does not have."""
    if not isinstance(tokenizer, HuggingFace):
        return {}
    file = pathlib.Path(tokenizer.file)
    files = {name: (file.parent / name).read_bytes() for name in TOKENIZER_FILES if (file.parent / name).is_file()}
    files["tokenizer.json"] = file.read_bytes()
    if "tokenizer_config.json" not in files:
        texts = json.loads(files["tokenizer.json"]).get("added_tokens", [])
        special = {f"{name}_token": token["content"] for name in ("bos", "eos") for token in texts
                   if token["id"] == getattr(tokenizer, f"{name}_id")}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
        files["tokenizer_config.json"] = json.dumps(settings, indent=2).encode()
    return files
