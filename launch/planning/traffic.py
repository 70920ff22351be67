"""Bytes that an instruction moves to and from a device's large memory: what it reads once and writes once.

Of an array that is only sliced, gathered from, or updated in part, the part counts. What the compiler keeps in on-chip
memory (on TPUs arrays with a memory space of their own) counts as nothing.
"""

from launch.planning.hlo import Array, Computation, Instruction, Module

# What moves nothing, or is counted where it begins or inside.
FREE = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
                  "replica-id", "while", "conditional", "call", "opt-barrier", "async-start", "async-update",
                  "async-done", "domain", "add-dependency"))
_MARKS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollectiveStart",
          "AsyncCollectiveDone", "Sharding", "annotate_device_placement")
_PARTS = ("dynamic-slice", "slice", "gather")
_IN_PLACE = ("dynamic-update-slice", "scatter")
_SAME = ("bitcast", "reshape")
HOST_SPACE = 5


class Memory:
    """Which memory spaces are the large one. on_chip: spaces other than 0 and the host's are none (TPUs)."""

    def __init__(self, on_chip: bool) -> None:
        self.on_chip = on_chip

    def bytes(self, *shape: Array) -> int:
        """Of these arrays."""
        return sum(a.bytes for a in shape if a.space in (0, HOST_SPACE) or not self.on_chip)

    def instruction(self, module: Module, where: Computation, instruction: Instruction) -> int:
        """Bytes read and written by one run of it."""
        opcode, given = instruction.opcode, [where.instructions[name].shape for name in instruction.operands
                                             if name in where.instructions]
        if opcode in FREE or opcode.endswith("-done") or opcode in ("send", "recv"):
            return 0
        if opcode == "custom-call" and instruction.attribute("custom_call_target").strip('"') in _MARKS:
            return 0
        if opcode == "fusion":
            return self._fusion(module, where, instruction)
        if opcode in _PARTS:
            return self._part(instruction, given)
        if opcode in _IN_PLACE:
            update = given[1] if opcode == "dynamic-update-slice" else given[-1]
            again = 1 if opcode == "dynamic-update-slice" else 2
            return self.bytes(*update) + again * self._like(update, instruction.shape)
        if opcode.endswith("-start"):  # copies between memories; collectives
            out = instruction.shape[len(given):] or instruction.shape
            if opcode == "slice-start":
                out = instruction.shape[1:2]
                return self.bytes(*out) + self._like(out, given[0])
            moved = [a for a in out if a.dims]
            return sum(self.bytes(*shape) for shape in given) + self.bytes(*moved)
        read = {name: where.instructions[name].shape for name in instruction.operands if name in where.instructions}
        return sum(self.bytes(*shape) for shape in read.values()) + self.bytes(*instruction.shape)

    def _part(self, instruction: Instruction, given: list[tuple[Array, ...]]) -> int:
        """What is taken is read where the whole is, and written."""
        indices = given[1] if instruction.opcode == "gather" and len(given) > 1 else ()
        return self.bytes(*instruction.shape) + self._like(instruction.shape, given[0]) + self.bytes(*indices)

    def _like(self, part: tuple[Array, ...], whole: tuple[Array, ...]) -> int:
        """Bytes of the part, in the memory of the whole."""
        return sum(self.bytes(a._replace(space=whole[0].space)) for a in part)

    def _fusion(self, module: Module, where: Computation, instruction: Instruction) -> int:
        """Its operands as far as they are read, and its results as far as they are written."""
        inner = module.computations[instruction.called()[0]]
        users, parameters = inner.users(), inner.parameters()
        total = 0
        for parameter, name in zip(parameters, instruction.operands, strict=False):
            if name in where.instructions:
                total += self._read(module, inner, users, parameter, where.instructions[name].shape)
        root = inner.root
        made = [root] if root.opcode != "tuple" else [inner.instructions[name] for name in root.operands]
        shapes = [instruction.shape] if len(made) == 1 else [(a,) for a in instruction.shape]
        for one, shape in zip(made, shapes, strict=False):
            total += self._written(inner, one, shape)
        return total

    def _read(self, module: Module, inner: Computation, users: dict[str, list[Instruction]], parameter: Instruction,
              outside: tuple[Array, ...]) -> int:
        """Of one operand of a fusion: the slices where nothing else reads it, nothing where it is updated in place or
        handed through."""
        waiting, total, whole = [parameter], 0, self.bytes(*outside)
        while waiting:
            at = waiting.pop()
            for user in users.get(at.name, ()):
                if user.opcode in _SAME:
                    waiting.append(user)
                elif user.opcode in _PARTS and user.operands[0] == at.name:
                    total += self._like(user.shape, outside)
                elif user.opcode in _IN_PLACE and user.operands[0] == at.name:
                    continue
                elif user.opcode == "fusion":
                    deeper = module.computations[user.called()[0]]
                    numbers = [n for n, name in enumerate(user.operands) if name == at.name]
                    for n in numbers:
                        total += self._read(module, deeper, deeper.users(), deeper.parameters()[n], outside)
                elif user.opcode != "tuple":
                    return whole
        return min(total, whole)

    def _written(self, inner: Computation, made: Instruction, shape: tuple[Array, ...]) -> int:
        """Of one result of a fusion: the update where it changes an operand in place."""
        while made.opcode in _SAME and made.operands:
            made = inner.instructions[made.operands[0]]
        if made.opcode == "parameter":
            return 0
        if made.opcode == "dynamic-update-slice":
            return self._like(inner.instructions[made.operands[1]].shape, shape)
        if made.opcode == "scatter":    # reads what it adds to
            return 2 * self._like(inner.instructions[made.operands[-1]].shape, shape)
        return self.bytes(*shape)
