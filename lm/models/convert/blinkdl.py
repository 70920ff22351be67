"""Weights with the names of BlinkDL's RWKV files, to and from our trees. Exact: arrays are renamed and transposed.

A map is (our path inside the block, their name, transposed). Theirs are [out, in]; a Dense kernel is [in, out].
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]
Map = tuple[tuple[str, str, bool], ...]

NORMS: Map = (("norm0/scale", "ln1.weight", False), ("norm0/bias", "ln1.bias", False),
              ("norm1/scale", "ln2.weight", False), ("norm1/bias", "ln2.bias", False))


def _mixes(layer: str, module: str, pattern: str, *names: tuple[str, str]) -> Map:
    return tuple((f"{layer}/mix_{ours}", f"{module}.{pattern.format(theirs)}", False) for ours, theirs in names)


def _kernels(layer: str, module: str, *names: tuple[str, str]) -> Map:
    return tuple((f"{layer}/{ours}/kernel", f"{module}.{theirs}.weight", True) for ours, theirs in names)


RKV = ("receptance", "r"), ("key", "k"), ("value", "v")
MAPS: dict[int, Map] = {
    4: (*NORMS, *_mixes("rwkv4", "att", "time_mix_{}", *RKV),
        *_kernels("rwkv4", "att", *((n, n) for n in ("receptance", "key", "value")), ("out", "output")),
        ("rwkv4/decay", "att.time_decay", False), ("rwkv4/bonus", "att.time_first", False),
        *_mixes("channel_mix", "ffn", "time_mix_{}", ("key", "k"), ("receptance", "r")),
        *_kernels("channel_mix", "ffn", *((n, n) for n in ("key", "receptance", "value")))),
    7: (*NORMS, *_mixes("rwkv7", "att", "x_{}", *RKV, ("decay", "w"), ("rate", "a"), ("gate", "g")),
        *_kernels("rwkv7", "att", *((n, n) for n in ("receptance", "key", "value")), ("out", "output")),
        *((f"rwkv7/{ours}_{end}/kernel", f"att.{theirs}{n}", False)
          for ours, theirs in (("decay", "w"), ("rate", "a"), ("gate", "g")) for end, n in (("in", 1), ("out", 2))),
        ("rwkv7/decay", "att.w0", False), ("rwkv7/rate", "att.a0", False), ("rwkv7/key_removal", "att.k_k", False),
        ("rwkv7/key_rate", "att.k_a", False), ("rwkv7/bonus", "att.r_k", False),
        ("rwkv7/norm/scale", "att.ln_x.weight", False), ("rwkv7/norm/bias", "att.ln_x.bias", False),
        *_mixes("channel_mix", "ffn", "x_{}", ("key", "k")),
        *_kernels("channel_mix", "ffn", ("key", "key"), ("value", "value"))),
}
VALUE_RESIDUAL: Map = (("rwkv7/value_in/kernel", "att.v1", False), ("rwkv7/value_out/kernel", "att.v2", False),
                       ("rwkv7/value_mix", "att.v0", False))
# Arrays that are no vectors, though some files write vectors as [1, 1, C].
MATRICES = {"att.r_k", *(f"att.{letter}{n}" for letter in "wavg" for n in (1, 2))}
# Parts of files that their own code never reads.
UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")


def version_of(tensors: Tensors) -> int:
    """Which RWKV wrote these names; raises ValueError where it is none of those known here."""
    if "blocks.0.att.k_k" in tensors:
        return 7
    if "blocks.0.att.time_first" in tensors and "blocks.0.att.ln_x.weight" not in tensors:
        return 4
    raise ValueError(f"these names are of no RWKV version known here ({', '.join(map(str, MAPS))}): "
                     f"{', '.join(sorted(tensors)[:8])}, ...")


def model_config(tensors: Tensors) -> dict[str, Any]:
    """The `model` group of a config for these weights."""
    version = version_of(tensors)
    vocab, width = tensors["emb.weight"].shape
    count = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    hidden = tensors["blocks.0.ffn.key.weight"].shape[0]
    config: dict[str, Any] = dict(embed_dim=width, num_layers=count, vocab_size=vocab, tie_embeddings=False,
                                  norm="layer", embed_norm=True, channel_mix=dict(version=version, mlp_dim=hidden))
    if version == 4:
        return config | dict(pattern=("rwkv4/channel_mix",),
                             rwkv4=dict(attention_dim=tensors["blocks.0.att.key.weight"].shape[0]))
    inner = ("decay", "w", 0), ("rate", "a", 0), ("gate", "g", 0), ("value", "v", count - 1)
    ranks = {f"{ours}_rank": tensors[f"blocks.{block}.att.{theirs}1"].shape[1] for ours, theirs, block in inner
             if f"blocks.{block}.att.{theirs}1" in tensors}
    fields = dict(head_dim=np.asarray(tensors["blocks.0.att.r_k"]).shape[-1], **ranks)
    return config | dict(prefix=("rwkv7_first/channel_mix",), pattern=("rwkv7/channel_mix",) if count > 1 else (),
                         rwkv7_first=dict(kind="rwkv7", value_residual=False, **fields), rwkv7=fields)


def from_blinkdl(tensors: Tensors, padded_vocab: int) -> dict[str, Any]:
    """The tree {"params": ...} of these weights for the model of `model_config`, whose tables have `padded_vocab` rows.

    Raises ValueError that lists the names which are missing, or which nothing here would read.
    """
    version, read = version_of(tensors), set(UNUSED)
    count = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    missing = []

    def take(name: str) -> np.ndarray:
        read.add(name)
        if name not in tensors:
            missing.append(name)
            return np.zeros((1, 1), np.float32)
        return np.asarray(tensors[name], np.float32)

    def block(n: int) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for ours, theirs, transposed in MAPS[version] + (VALUE_RESIDUAL if version == 7 and n else ()):
            value = take(f"blocks.{n}.{theirs}")
            value = value.T if transposed else value if theirs in MATRICES else value.reshape(-1)
            put(tree, ours.replace("rwkv7/", "rwkv7_first/") if n == 0 else ours, value)
        return tree

    def rows(table: np.ndarray) -> np.ndarray:
        return np.pad(table, ((0, padded_vocab - len(table)), (0, 0)))

    blocks = [block(n) for n in range(count)]
    first = 1 if version == 7 else 0
    stack = {f"prefix_{n}": blocks[n] for n in range(first)}
    norm = lambda name: {"scale": take(f"{name}.weight"), "bias": take(f"{name}.bias")}
    params = {"embed": {"embedding": rows(take("emb.weight"))}, "embed_norm": norm("blocks.0.ln0"), "stack": stack,
              "final_norm": norm("ln_out"), "head": {"kernel": rows(take("head.weight"))}}
    surplus = sorted(set(tensors) - read)
    if missing or surplus:
        raise ValueError(f"not the weights of an RWKV-{version}: missing {sorted(missing) or 'none'}, "
                         f"not understood {surplus or 'none'}")
    if blocks[first:]:
        stack["pattern_0"] = merge(blocks[first:])
    return {"params": params}


def put(tree: dict[str, Any], path: str, value: np.ndarray) -> None:
    """Set tree["a"]["b"] of path "a/b"."""
    *folders, leaf = path.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[leaf] = value


def merge(trees: list[dict[str, Any]]) -> dict[str, Any]:
    """Equal trees stacked on a new leading axis."""
    first = trees[0]
    return {name: merge([t[name] for t in trees]) if isinstance(part, dict) else np.stack([t[name] for t in trees])
            for name, part in first.items()}
