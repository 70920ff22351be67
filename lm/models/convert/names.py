"""Weights under other names: which of our parameters is which of their tensors. Exact: renamed, reshaped, transposed.

A `Layout` is data. One function reads a file's tensors into our tree by it, another writes our tree under their names.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn

from lm.core.tree import named_leaves
from lm.models.build import abstract_params
from lm.models.decoder import DecoderLM

Tensors = Mapping[str, np.ndarray]


class Entry(NamedTuple):
    """One parameter. ours: its path in the block, or in the whole tree. theirs: the tensor's name.

    transposed: theirs is [out, in], as torch keeps matrices. shape: theirs, where ours is flat; -1 is what remains.
    table: ours has rows of padding at the end.
    """

    ours: str
    theirs: str
    transposed: bool = False
    shape: tuple[int, ...] | None = None
    table: bool = False


class Layout(NamedTuple):
    """whole: entries outside of blocks. blocks: those of each block. prefix: how many blocks stand before the pattern.
    unused: matches tensors that their own code never reads; None for none."""

    whole: tuple[Entry, ...]
    blocks: tuple[tuple[Entry, ...], ...]
    prefix: int = 0
    unused: re.Pattern | None = None


def linear(pairs: Iterable[tuple[str, str]], bias: bool = False) -> tuple[Entry, ...]:
    """Entries of linear layers (our path, their name): kernels, and biases where they have them."""
    return tuple(entry for ours, theirs in pairs for entry in (
        Entry(f"{ours}/kernel", f"{theirs}.weight", transposed=True),
        *([Entry(f"{ours}/bias", f"{theirs}.bias")] if bias else [])))


def norm(ours: str, theirs: str, bias: bool = True) -> tuple[Entry, ...]:
    """Entries of a norm."""
    return (Entry(f"{ours}/scale", f"{theirs}.weight"), *([Entry(f"{ours}/bias", f"{theirs}.bias")] if bias else []))


def in_block(prefix: str, entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The entries with `prefix` before their names."""
    return tuple(entry._replace(theirs=prefix + entry.theirs) for entry in entries)


def count_blocks(names: Iterable[str], pattern: str) -> int:
    """1 + the largest number that `pattern`, a regular expression with one group, finds in the names; 0 for none."""
    found = (re.match(pattern, name) for name in names)
    return 1 + max((int(m[1]) for m in found if m), default=-1)


def from_names(layout: Layout, tensors: Tensors, model: DecoderLM, what: str) -> dict[str, Any]:
    """The tree {"params": ...}, float32, of these tensors for this model.

    Raises ValueError that lists every tensor that is missing, that nothing here would read, or that has a shape which
    the model has no place for. what: names the kind of weights in the message.
    """
    expected = {name: tuple(leaf.shape) for name, leaf in named_leaves(nn.meta.unbox(abstract_params(model))).items()}
    used, missing, misshapen, tree = set(), [], [], {}

    def take(entry: Entry, place: str, stacked: bool) -> np.ndarray | None:
        used.add(entry.theirs)
        if entry.theirs not in tensors:
            missing.append(entry.theirs)
            return None
        value = np.asarray(tensors[entry.theirs])
        there = value.shape
        value = value.reshape(-1) if entry.shape is not None else value.T if entry.transposed else value
        want = expected[place][1:] if stacked else expected[place]
        if entry.table and value.ndim == 2 and len(value) == model.vocab_size:
            value = np.pad(value, ((0, want[0] - len(value)), (0, 0)))
        if value.shape != want:
            misshapen.append(f"{entry.theirs} {list(there)}, which would be {list(value.shape)} where this model has "
                             f"{list(want)}")
            return None
        return value.astype(np.float32)

    for entry in layout.whole:
        put(tree, entry.ours, take(entry, entry.ours, False))
    for n, block in enumerate(layout.blocks[:layout.prefix]):
        for entry in block:
            place = f"stack/prefix_{n}/{entry.ours}"
            put(tree, place, take(entry, place, False))
    repeated = layout.blocks[layout.prefix:]
    for entries in zip(*repeated, strict=True):
        place = f"stack/pattern_0/{entries[0].ours}"
        values = [take(entry, place, True) for entry in entries]
        put(tree, place, None if any(value is None for value in values) else np.stack(values))
    surplus = sorted(name for name in tensors if name not in used
                     and not (layout.unused and layout.unused.fullmatch(name)))
    if missing or surplus or misshapen:
        raise ValueError(f"not the weights of {what}: missing {_listed(missing)}; not understood {_listed(surplus)}; "
                         f"of another shape {_listed(misshapen)}")
    if set(named_leaves(tree)) != set(expected):
        raise AssertionError(f"the layout of {what} leaves out {sorted(set(expected) - set(named_leaves(tree)))}")
    return {"params": tree}


def to_names(layout: Layout, params: Mapping[str, Any], vocab_size: int,
             cast: Callable[[np.ndarray], np.ndarray] = lambda value: value) -> dict[str, np.ndarray]:
    """Their tensors of the tree {"params": ...}, in the layout's order, each through `cast`; the inverse of
    `from_names`."""
    leaves = named_leaves(params)

    def give(entry: Entry, value: np.ndarray) -> np.ndarray:
        value = value[:vocab_size] if entry.table else value.T if entry.transposed else value
        return np.ascontiguousarray(cast(value if entry.shape is None else value.reshape(entry.shape)))

    out = {entry.theirs: give(entry, np.asarray(leaves[entry.ours])) for entry in layout.whole}
    for n, block in enumerate(layout.blocks):
        for entry in block:
            if n < layout.prefix:
                value = np.asarray(leaves[f"stack/prefix_{n}/{entry.ours}"])
            else:
                value = np.asarray(leaves[f"stack/pattern_0/{entry.ours}"][n - layout.prefix])
            out[entry.theirs] = give(entry, value)
    return out


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Sets tree["a"]["b"] of path "a/b"."""
    *folders, leaf = path.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[leaf] = value


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "nothing"
