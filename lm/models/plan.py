"""What a model costs before anything is allocated: parameters in all and active, FLOPs a token, and its layers' grain.

Active are the parameters that a token's forward pass multiplies with: all of an MLP, of experts those that are chosen.
"""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import NamedTuple

import jax
from flax import linen as nn

from lm.core.sharding import spec
from lm.core.tree import STATS, named_leaves
from lm.models.build import abstract_params
from lm.models.decoder import DecoderLM


class Row(NamedTuple):
    """name: of a layer. count: how often it stands in the model; the numbers are those of all of them. total, active:
    parameters. granularity: experts that a token uses (He 2024: active parameters over those of an expert), 1 for dense
    layers, 0 for what has none. flops: forward, a token."""

    name: str
    count: int
    total: int
    active: int
    granularity: int
    flops: float


def rows(model: DecoderLM, seq_len: int) -> list[Row]:
    """A row for each layer name, then norms, embedding and head, and all."""
    D, sizes = model.embed_dim, _sizes(model)
    found: dict[str, Row] = {}
    for place, block, repeats, loops in model.blocks():
        for name, layer in zip(block.names, block.layers, strict=True):
            total = sizes.pop(f"{place}/{name}", 0)
            active = repeats * layer.active_params(D) if hasattr(layer, "active_params") else total
            name = name if loops == 1 else f"{name}, x {loops:.4g}"
            before = found.get(name, Row(name, 0, 0, 0, 0, 0.0))
            flops = before.flops + repeats * loops * layer.flops_per_token(D, seq_len)
            found[name] = Row(name, before.count + repeats, before.total + total, before.active + active,
                              getattr(layer, "granularity", 1), flops)
    head = model.padded_vocab * D
    tables = sum(sizes.pop(name, 0) for name in ("embed", "head", "memory", "position"))
    if "adapter" in sizes:
        size, loops = sizes.pop("adapter"), max(loops for *_, loops in model.blocks())
        found["adapter"] = Row(f"adapter, x {loops:.4g}", 1, size, size, 1, 2.0 * loops * size)
    out = [*found.values(), Row("norms", 0, sum(sizes.values()), sum(sizes.values()), 0, 0.0),
           Row("embedding, head", 0, tables, head + (0 if model.tie_embeddings else D), 0, 2.0 * head)]
    layers = sum(repeats for _, _, repeats, _ in model.blocks())
    return [*out, Row("all", layers, *(sum(row[i] for row in out) for i in (2, 3)), 0,
                      model.flops_per_token(seq_len))]


def _sizes(model: DecoderLM) -> dict[str, int]:
    """Parameters of each layer (`<name of the block>/<layer>`) and of everything else by its first name."""
    blocks = {name for name, *_ in model.blocks()}
    sizes: dict[str, int] = {}
    for name, leaf in named_leaves({"params": nn.meta.unbox(abstract_params(model))["params"]}).items():
        parts = name.split("/")
        key = "/".join(parts[:3]) if "/".join(parts[:2]) in blocks else parts[0]
        sizes[key] = sizes.get(key, 0) + leaf.size
    return sizes


def format_rows(table: list[Row]) -> str:
    """The rows as aligned text."""
    cells = [("layer", "count", "parameters", "active", "granularity", "forward FLOPs a token")]
    cells += [(row.name, str(row.count or ""), f"{row.total:,}", f"{row.active:,}", str(row.granularity or ""),
               f"{row.flops:,.0f}") for row in table]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:],
                                                                                         strict=True))]).rstrip()
                     for line in cells)


def parameter_bytes(model: DecoderLM, mesh: Mapping[str, int]) -> int:
    """Bytes of parameters and running statistics that a device of a mesh of these sizes holds."""
    sizes = SimpleNamespace(shape=dict(mesh))

    def one(leaf):
        boxed = isinstance(leaf, nn.LogicallyPartitioned)
        value = leaf.value if boxed else leaf
        parts = spec(leaf.names, value.shape, sizes) if boxed else ()
        axes = [axis for part in parts for axis in ((part,) if isinstance(part, str) else part or ())]
        return value.size * value.dtype.itemsize // math.prod(sizes.shape[axis] for axis in axes)

    tree = abstract_params(model)
    assert set(tree) <= {"params", STATS}
    return sum(map(one, jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))))
