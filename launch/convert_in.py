"""From published weights to a workdir that every other command takes."""

import contextlib
import json
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from launch import config as configs
from launch.config_workdir import check_place
from lm.core.tree import num_params
from lm.data.tokenizer import build_tokenizer
from lm.models.build import build_model
from lm.models.convert.source import Weights, read_weights
from lm.train.checkpoint import open_checkpoints
from lm.train.options import CheckpointOptions

SOURCE_FILE, TOKENIZER_FOLDER = "source.json", "tokenizer"
LONGEST = 1024  # config.train.seq_len at most: contexts of 100,000 tokens are no length to train at by default
WORLD_VOCAB, WORLD = 65_536, {"kind": "rwkv_world", "package": "rwkv", "path": "rwkv_vocab_v20230424.txt"}
# File of a tokenizer -> its kind.
KINDS = {".json": "tokenizers", ".model": "sentencepiece", ".tiktoken": "tiktoken", ".txt": "rwkv_world"}


@contextlib.contextmanager
def staged(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A place beside `path` that becomes `path` when the block ends well, and is removed when it does not.

    Raises ValueError where `path` is there already, unless it is an empty folder.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path} is there already, and is not overwritten; name another place, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        yield stage
        if path.is_dir():
            path.rmdir()
        stage.rename(path)
    finally:
        if stage.is_dir():
            shutil.rmtree(stage)
        stage.unlink(missing_ok=True)


def write_workdir(source: pathlib.Path, workdir: str, tokenizer: str | None,
                  overrides: Sequence[tuple[str, Any]] = ()) -> str:
    """Converts and returns what was done, in words. Nothing is left behind where it fails."""
    if "://" in workdir:
        raise ValueError(f"--workdir {workdir}: lm convert writes local folders; copy it there afterwards")
    check_place(workdir)
    place = pathlib.Path(workdir).absolute()
    with staged(place) as stage:
        weights = read_weights(source)
        files, spec = tokenizer_of(weights, tokenizer, source)
        for name, data in files.items():
            target = stage / TOKENIZER_FOLDER / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        made = build_tokenizer(located(spec, stage), "--tokenizer")
        half = weights.dtype != np.dtype("<f4")
        longest = weights.hf.get("max_position_embeddings") or weights.hf.get("context_length") or LONGEST
        config = configs.resolve({
            "model": {**weights.model, "dtype": "bfloat16" if half else "float32"},
            "data": {"tokenizer": located(spec, place)}, "train": {"seq_len": min(longest, LONGEST)}}, overrides)
        model = build_model(config.model.to_dict(), made.vocab_size)
        params = weights.params()
        with open_checkpoints(stage, CheckpointOptions()) as checkpoints:
            checkpoints.save(0, {"params": params}, {})
        info = {"what": weights.what, "dtype": weights.dtype.name, "config": dict(weights.hf)}
        (stage / SOURCE_FILE).write_text(json.dumps(info, indent=2) + "\n")
        (stage / configs.CONFIG_FILE).write_text(configs.to_json(config))
    return (f"{weights.what}: {num_params(params):,} parameters of {len(weights.layout.blocks)} blocks, "
            f"{weights.dtype.name}, vocabulary {model.vocab_size:,}, tokenizer {spec['kind']} -> {workdir}")


def located(spec: Mapping[str, Any], place: pathlib.Path) -> dict[str, Any]:
    """The tokenizer with the file that it has in this workdir."""
    if "path" in spec and "package" not in spec:
        return {**spec, "path": str(place / TOKENIZER_FOLDER / spec["path"])}
    return dict(spec)


def tokenizer_of(weights: Weights, given: str | None, source: pathlib.Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(files to keep, what builds the tokenizer, its path by the file's name alone).

    Raises ValueError where there is none, or the one that is given is of no known kind.
    """
    vocab, files = weights.model["vocab_size"], dict(weights.tokenizer)
    if given == "bytes" or (given is None and vocab == 256):
        return {}, {"kind": "bytes"}
    if given is not None:
        path = pathlib.Path(given).expanduser()
        if path.suffix not in KINDS:
            raise ValueError(f"--tokenizer {given}: give 'bytes' or a file that ends in {', '.join(KINDS)}")
        if not path.is_file():
            raise FileNotFoundError(f"--tokenizer {given}: there is no such file")
        return {path.name: path.read_bytes()}, _named(KINDS[path.suffix], path.name, weights.hf)
    for name in ("tokenizer.json", "tokenizer.model"):
        if name in files:
            return files, _named(KINDS[pathlib.Path(name).suffix], name, weights.hf)
    if vocab == WORLD_VOCAB:
        return {}, dict(WORLD)
    raise ValueError(f"{source} brings no tokenizer for its {vocab:,} token ids; give --tokenizer FILE "
                     f"(tokenizer.json, *.model, *.tiktoken, rwkv_vocab_*.txt) or --tokenizer bytes")


def _named(kind: str, name: str, hf: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of a file, with the special ids of config.json where the kind takes them."""
    if kind != "tokenizers":
        return {"kind": kind, "path": name}
    ids = {short: hf.get(f"{short}_token_id") for short in ("bos", "eos")}
    ids = {short: value[0] if isinstance(value, list) and value else value for short, value in ids.items()}
    return {"kind": kind, "path": name, **{short: value for short, value in ids.items() if isinstance(value, int)}}
