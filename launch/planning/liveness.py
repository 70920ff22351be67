"""What the backward pass keeps of the forward pass: the arrays that are alive where the first turns into the second.

A compiled program lists its instructions in the order in which they run, and what belongs to the backward pass says so
(`transpose(...)` in its metadata). Bytes are of a device and without the padding of tiles.
"""

import re

from launch.planning.hlo import Computation, Instruction, Module
from launch.planning.matrix import product_of
from launch.planning.traffic import HOST_SPACE
from launch.planning.work import kernel_of

_THROUGH = ("bitcast", "reshape", "copy-done", "opt-barrier")


def kept_for_backward(module: Module, *, on_chip: bool) -> int:
    """Bytes in the large memory that are neither arguments nor parts of the loop around: activations. 0 where there is
    no backward pass."""
    where = turning(module)
    if where is None:
        return 0
    order = list(where.instructions.values())
    first = next((n for n, one in enumerate(order) if backward(one) and _heavy(module, where, one)), len(order))
    origins = _Origins(module, where)
    before = {one.name for one in order[:first]}
    alive: dict[tuple[str, int], int] = {}
    for one in order[first:]:
        for name in one.operands:
            if name in before:
                for origin, size in origins.of(name):
                    alive[origin] = size if not on_chip or origins.large(origin) else 0
    return sum(alive.values())


def backward(one: Instruction) -> bool:
    """Whether an instruction says that it is of the backward pass."""
    return "transpose(" in one.rest and one.opcode not in ("constant", "parameter", "get-tuple-element", "bitcast")


def turning(module: Module) -> Computation | None:
    """The computation that runs both passes: the entry, or the body of the loop over microbatches."""
    where = module.computations[module.entry]
    while True:
        loops = [one for one in where.instructions.values() if one.opcode == "while"]
        if any(backward(one) and _heavy(module, where, one) for one in where.instructions.values()):
            return where
        inside = [module.computations[re.search(r"body=%?([\w.\-]+)", one.rest)[1]] for one in loops]
        inside = [body for body in inside if any(backward(one) for one in body.instructions.values())]
        if not inside:
            return None
        where = max(inside, key=lambda body: len(body.instructions))


def _heavy(module: Module, where: Computation, one: Instruction) -> bool:
    """A loop, a kernel or a matrix product: what is light, such as zeros for sums, may be made long before."""
    if one.opcode == "fusion":
        inner = module.computations[one.called()[0]]
        return any(_heavy(module, inner, part) for part in inner.instructions.values())
    return one.opcode in ("while", "convolution", "dot") or kernel_of(where, one) is not None \
        or product_of(where, one) is not None


class _Origins:
    """Which instruction made what a name stands for, looking through tuples, views and loops that hand it on."""

    def __init__(self, module: Module, where: Computation) -> None:
        self.module, self.where = module, where

    def large(self, origin: tuple[str, int]) -> bool:
        """Whether it lies in the large memory."""
        shape = self.where.instructions[origin[0]].shape
        return not shape or shape[min(origin[1], len(shape) - 1)].space in (0, HOST_SPACE)

    def of(self, name: str, index: int | None = None) -> list[tuple[tuple[str, int], int]]:
        """[((instruction, number of its result), bytes)]; arguments of the computation and constants are none."""
        one = self.where.instructions[name]
        if one.opcode in ("parameter", "constant", "iota", "after-all", "partition-id"):
            return []
        if one.opcode in _THROUGH and one.operands[0] in self.where.instructions:
            return self.of(one.operands[0], index)
        if one.opcode == "tuple":
            chosen = one.operands if index is None else one.operands[index:index + 1]
            return [found for name in chosen for found in self.of(name)]
        if one.opcode == "get-tuple-element":
            return self.of(one.operands[0], int(one.attribute("index")))
        if one.opcode == "while" and index is not None and _handed_on(self.module, one, index):
            return self.of(one.operands[0], index)
        numbers = range(len(one.shape)) if index is None else [min(index, len(one.shape) - 1)]
        return [((name, n), one.shape[n].bytes) for n in numbers if one.shape]


def _handed_on(module: Module, loop: Instruction, index: int) -> bool:
    """Whether a loop gives this result back as it got it."""
    body = module.computations[re.search(r"body=%?([\w.\-]+)", loop.rest)[1]]
    if body.root.opcode != "tuple" or index >= len(body.root.operands):
        return False
    one = body.instructions[body.root.operands[index]]
    while one.opcode in _THROUGH:
        one = body.instructions[one.operands[0]]
    source = body.instructions.get(one.operands[0]) if one.opcode == "get-tuple-element" else None
    return source is not None and source.opcode == "parameter" and int(one.attribute("index")) == index
