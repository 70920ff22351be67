"""Weights with the names of BlinkDL's RWKV files, versions 4, 5.2, 6 and 7.

Theirs keep vectors as [1, 1, C], or [H, K] where the code wants heads; ours are flat.
"""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from lm.layers.rwkv6 import MIXED
from lm.models.convert.names import Entry, Layout, Tensors, count_blocks, from_names, in_block, linear, norm
from lm.models.decoder import DecoderLM

VECTOR = (1, 1, -1)
NAMES = {4: "RWKV-4", 5: "RWKV-5.2", 6: "RWKV-6", 7: "RWKV-7"}
LETTERS = {"receptance": "r", "key": "k", "value": "v", "gate": "g", "decay": "w", "rate": "a", "all": "x"}
PROJECTIONS = {4: ("receptance", "key", "value"), 5: ("receptance", "key", "value", "gate"),
               6: ("receptance", "key", "value", "gate"), 7: ("receptance", "key", "value")}
# How each version names its mixing coefficients, and which there are.
MIXES = {4: ("time_mix_", ("receptance", "key", "value")), 5: ("time_mix_", ("receptance", "key", "value", "gate")),
         6: ("time_maa_", ("all", *MIXED)), 7: ("x_", ("receptance", "key", "value", "decay", "rate", "gate"))}
# Parts of files that their own code never reads.
UNUSED = re.compile(r"blocks\.0\.att\.v[012]")


def _mixes(layer: str, module: str, prefix: str, names: Iterable[str]) -> tuple[Entry, ...]:
    return tuple(Entry(f"{layer}/mix_{n}", f"{module}.{prefix}{LETTERS[n]}", shape=VECTOR) for n in names)


def _recurrence(version: int, layer: str, head_dim: int, value_residual: bool) -> tuple[Entry, ...]:
    """What stands in the time mixing besides its projections and static mixtures."""
    heads = (-1, head_dim)
    if version == 4:
        return (Entry(f"{layer}/decay", "att.time_decay", shape=(-1,)),
                Entry(f"{layer}/bonus", "att.time_first", shape=(-1,)))
    head_norm = norm(f"{layer}/norm", "att.ln_x")
    if version in (5, 6):
        shared = (*head_norm, Entry(f"{layer}/decay", "att.time_decay", shape=heads if version == 5 else VECTOR),
                  Entry(f"{layer}/bonus", "att.time_faaaa", shape=heads))
        if version == 5:
            return shared
        return (*shared, Entry(f"{layer}/mix_in/kernel", "att.time_maa_w1"),
                *(Entry(f"{layer}/mix_{name}_out/kernel", f"att.time_maa_w2[{n}]") for n, name in enumerate(MIXED)),
                Entry(f"{layer}/decay_in/kernel", "att.time_decay_w1"),
                Entry(f"{layer}/decay_out/kernel", "att.time_decay_w2"))
    maps = ("decay", "w"), ("rate", "a"), ("gate", "g"), *([("value", "v")] if value_residual else [])
    vectors = {"decay": "w0", "rate": "a0", "key_removal": "k_k", "key_rate": "k_a",
               **({"value_mix": "v0"} if value_residual else {})}
    return (*head_norm, Entry(f"{layer}/bonus", "att.r_k"),
            *(Entry(f"{layer}/{ours}_{end}/kernel", f"att.{theirs}{n}")
              for ours, theirs in maps for end, n in (("in", 1), ("out", 2))),
            *(Entry(f"{layer}/{ours}", f"att.{theirs}", shape=VECTOR) for ours, theirs in vectors.items()))


def layout(version: int, count: int, head_dim: int = 64) -> Layout:
    """Names of a model of `count` blocks."""
    def block(n: int) -> tuple[Entry, ...]:
        first = version == 7 and n == 0
        layer, (prefix, mixes) = "rwkv7_first" if first else f"rwkv{version}", MIXES[version]
        projections = ((f"{layer}/{p}", f"att.{p}") for p in PROJECTIONS[version])
        mixed = ("key",) if version == 7 else ("key", "receptance")
        return in_block(f"blocks.{n}.", (
            *norm("norm0", "ln1"), *norm("norm1", "ln2"), *_mixes(layer, "att", prefix, mixes),
            *linear((*projections, (f"{layer}/out", "att.output"))),
            *_recurrence(version, layer, head_dim, not first), *_mixes("channel_mix", "ffn", prefix, mixed),
            *linear((f"channel_mix/{p}", f"ffn.{p}") for p in (*mixed, "value"))))

    whole = (Entry("embed/embedding", "emb.weight", table=True), *norm("embed_norm", "blocks.0.ln0"),
             *norm("final_norm", "ln_out"), Entry("head/kernel", "head.weight", table=True))
    return Layout(whole, tuple(block(n) for n in range(count)), 1 if version == 7 else 0, UNUSED)


def is_blinkdl(tensors: Iterable[str]) -> bool:
    """Whether these names are of a version known here."""
    names = set(tensors)
    return "blocks.0.att.k_k" in names or "blocks.0.att.time_first" in names or "blocks.0.att.time_faaaa" in names


def version_of(tensors: Tensors) -> int:
    """Which RWKV wrote these names; raises ValueError where it is none of those known here."""
    if "blocks.0.att.k_k" in tensors:
        return 7
    if "blocks.0.att.time_maa_w1" in tensors:
        return 6
    if "blocks.0.att.time_faaaa" in tensors and "blocks.0.att.gate.weight" in tensors:
        return 5
    if "blocks.0.att.time_first" in tensors and "blocks.0.att.ln_x.weight" not in tensors:
        return 4
    raise ValueError(f"these names are of no RWKV version known here ({', '.join(NAMES.values())}): "
                     f"{', '.join(sorted(tensors)[:8])}, ...")


def num_blocks(tensors: Iterable[str]) -> int:
    """How many blocks these names are of."""
    return count_blocks(tensors, r"blocks\.(\d+)\.")


def split_mixes(tensors: Tensors) -> dict[str, np.ndarray]:
    """The tensors with RWKV-6's five low-rank maps, which stand in one array, as one each."""
    out = {}
    for name, value in tensors.items():
        if name.endswith("time_maa_w2") and np.ndim(value) == 3:
            out |= {f"{name}[{n}]": part for n, part in enumerate(value)}
        else:
            out[name] = value
    return out


def join_mixes(tensors: Tensors) -> dict[str, np.ndarray]:
    """The inverse of `split_mixes`."""
    out: dict[str, Any] = {}
    for name, value in tensors.items():
        whole, bracket, _ = name.partition("[")
        if bracket:
            out.setdefault(whole, []).append(value)
        else:
            out[name] = value
    return {name: np.stack(value) if isinstance(value, list) else value for name, value in out.items()}


def model_config(tensors: Tensors) -> dict[str, Any]:
    """The `model` group of a config for these weights. Raises ValueError where what it needs to look at is missing."""
    version = version_of(tensors)
    count = num_blocks(tensors)

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise ValueError(f"not the weights of {NAMES[version]}: missing {name}")
        return tuple(np.shape(tensors[name]))

    vocab, width = shape("emb.weight")
    config: dict[str, Any] = dict(
        embed_dim=width, num_layers=count, vocab_size=vocab, tie_embeddings=False, norm="layer", embed_norm=True,
        channel_mix=dict(version=version, mlp_dim=shape("blocks.0.ffn.key.weight")[0]))
    fields: dict[str, Any] = {}
    if version == 4:
        fields = dict(attention_dim=shape("blocks.0.att.key.weight")[0])
    elif version in (5, 6):
        fields = dict(head_dim=shape("blocks.0.att.time_faaaa")[1])
    if version == 6:
        fields |= dict(mix_rank=shape("blocks.0.att.time_maa_w1")[1] // len(MIXED),
                       decay_rank=shape("blocks.0.att.time_decay_w1")[1])
    if version < 7:
        return config | {"pattern": (f"rwkv{version}/channel_mix",), f"rwkv{version}": fields}
    inner = ("decay", "w", 0), ("rate", "a", 0), ("gate", "g", 0), *([("value", "v", 1)] if count > 1 else [])
    ranks = {f"{ours}_rank": shape(f"blocks.{n}.att.{theirs}1")[1] for ours, theirs, n in inner}
    fields = dict(head_dim=shape("blocks.0.att.r_k")[1], **ranks)
    return config | dict(prefix=("rwkv7_first/channel_mix",), pattern=("rwkv7/channel_mix",) if count > 1 else (),
                         rwkv7_first=dict(kind="rwkv7", value_residual=False, **fields), rwkv7=fields)


def from_blinkdl(tensors: Tensors, model: DecoderLM) -> dict[str, Any]:
    """The tree {"params": ...} of these weights for the model that `model_config` describes.

    Raises ValueError that lists the names which are missing, have another shape, or which nothing here would read.
    """
    version = version_of(tensors)
    made = layout(version, num_blocks(tensors))
    return from_names(made, split_mixes(tensors), model, NAMES[version])
