"""Collectives of a compiled program: their kind, what they move, who takes part, and how long the links need for it.

A ring, or any other algorithm, makes each of n devices send (n - 1) / n of what an all-gather makes or a reduce-scatter
takes, and an all-reduce is both: that over what a chip can send is the least time.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from launch.planning.chips import Chip
from launch.planning.hlo import Computation, Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")
_LISTS = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}")
_BETWEEN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")


class Collective(NamedTuple):
    """One instruction. bytes: that a device puts in or gets out, whichever is more. groups: [G, n] numbers of devices,
    in the order of the mesh; for a permutation the pairs [P, 2]; where `between` is true, numbers of slices. shared:
    XLA works while it is under way. between: what is left of a collective over several slices, which hosts send."""

    kind: str
    bytes: int
    groups: np.ndarray
    shared: bool
    between: bool = False

    @property
    def sent(self) -> float:
        """Bytes that a device sends."""
        n = self.groups.shape[1]
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        return self.bytes * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)

    def seconds(self, chip: Chip, granules: Sequence[int]) -> float:
        """The least time on this chip's links. granules: the slice or host of each device. Of a group in several, each
        device has its share of the rest to send over the network (the parts that meet there were reduced, or are to
        be spread, within). Raises ValueError where the network's speed is not published."""
        per_device = 1 / chip.devices
        apart = 0 if self.between else max(len({granules[n] for n in row}) for row in self.groups.tolist())
        if apart == 1:
            return self.sent / (chip.link * per_device)
        if chip.network is None:
            raise ValueError(f"the bandwidth of {chip.name} between slices is not published; plan a single slice")
        if self.between or self.kind in ("collective-permute", "collective-broadcast"):
            return self.sent / (chip.network * per_device)
        n = self.groups.shape[1]
        inside = max(1, n // apart)
        twice = 2 if self.kind == "all-reduce" else 1
        beyond = self.bytes / inside * (apart - 1) / apart * twice
        within = self.bytes * (inside - 1) / inside * twice
        return max(within / (chip.link * per_device), beyond / (chip.network * per_device))


def collective_of(module: Module, where: Computation, instruction: Instruction, devices: int) -> Collective | None:
    """What this instruction moves, None where it is no collective, or none that counts: the end of an asynchronous one,
    or a part of one that runs beside others."""
    kind = instruction.opcode.removesuffix("-start")
    if kind == "send" and _BETWEEN.search(instruction.rest):
        return _between(where, instruction)
    if kind not in KINDS or beside(where):
        return None
    given = [arrays for name in instruction.operands if name in where.instructions
             for arrays in where.instructions[name].shape]
    shape = instruction.shape
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        shape = shape[len(given):]  # the operands come first in what a start returns
    size = max(sum(a.bytes for a in given), sum(a.bytes for a in shape if a.dims))
    if kind == "all-reduce" and _scatters(module, where, instruction):
        kind = "reduce-scatter"
    groups = groups_of(instruction.rest, devices)
    shared = instruction.opcode.endswith("-start") or "AsyncCollectiveStart" in _targets(where)
    return None if groups.shape[1] == 1 else Collective(kind, size, groups, shared)


def _between(where: Computation, instruction: Instruction) -> Collective:
    """What a device's host sends to other slices: `_xla_megascale_target="{1,2}x{0:3}"` counts slices, then devices."""
    kind = _BETWEEN.search(instruction.rest)[1].lower().replace("_", "-")
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', instruction.rest)
    ends = [part.split(":") for part in target[1].split(",")] if target else [["0", "1"]]
    count = max(2, sum(int(end[-1]) - int(end[0]) + 1 for end in ends))
    size = sum(a.bytes for a in where.instructions[instruction.operands[0]].shape)
    return Collective(kind, size, np.arange(count)[None], True, True)


def beside(where: Computation) -> bool:
    """Whether a computation repeats a collective that another one starts."""
    return where.name.startswith("async_collective_fusion") or "AsyncCollectiveDone" in _targets(where)


def _targets(where: Computation) -> set[str]:
    return {instruction.attribute("custom_call_target").strip('"') for instruction in where.instructions.values()
            if instruction.opcode == "custom-call"}


def _scatters(module: Module, where: Computation, instruction: Instruction) -> bool:
    """An all-reduce of which only a slice is kept, fused, is a reduce-scatter on TPUs."""
    users = [i for i in where.instructions.values() if instruction.name in i.operands]
    return "all-reduce-scatter" in where.name and bool(users) and all(i.opcode == "dynamic-slice" for i in users)


def groups_of(attributes: str, devices: int) -> np.ndarray:
    """[G, n] of any of the forms in which HLO writes groups; all devices where none are written."""
    if match := _LISTS.search(attributes):
        return _table(match[1])
    if match := _PAIRS.search(attributes):
        return _table(match[1])
    if match := _IOTA.search(attributes):
        count, size = int(match[1]), int(match[2])
        return _iota(match[3], match[4]).reshape(count, size)
    if match := _MESH.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", match[1])}
        ids = _iota(match[2], match[3]) if match[2] else np.arange(int(np.prod(list(sizes.values()))))
        return _by_axes(ids.reshape(*sizes.values()), list(sizes), match[4])
    return np.arange(devices)[None]


def _by_axes(grid: np.ndarray, axes: list[str], wanted: str) -> np.ndarray:
    """Groups along the wanted axes, or along a part of one, written 'axis':(devices before it)size."""
    along = []
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", wanted):
        at = axes.index(name)
        if size:
            n = grid.shape[at]
            parts = (int(before), int(size), n // (int(before) * int(size)))
            grid = grid.reshape(*grid.shape[:at], *parts, *grid.shape[at + 1:])
            axes = [*axes[:at], f"{name} before", name, f"{name} after", *axes[at + 1:]]
            at += 1
            axes[at] = f"{name} taken {len(along)}"
        along.append(axes[at])
    places = [axes.index(name) for name in along]
    rest = [n for n in range(grid.ndim) if n not in places]
    size = int(np.prod([grid.shape[n] for n in places], initial=1))
    return grid.transpose(*rest, *places).reshape(-1, size)


def _iota(dims: str, order: str | None) -> np.ndarray:
    shape = [int(n) for n in dims.split(",")]
    ids = np.arange(int(np.prod(shape))).reshape(shape)
    return (ids.transpose([int(n) for n in order.split(",")]) if order else ids).reshape(-1)


def _table(text: str) -> np.ndarray:
    rows = [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", text)]
    most = max(map(len, rows))
    return np.array([row + row[-1:] * (most - len(row)) for row in rows])
