"""Read the text of a compiled program (HLO): computations, instructions, shapes, and how often loops run.

XLA's own cost analysis counts the body of a loop once; here the trips are read from the loops. Everything is a device's
share: compiled programs are already split over the mesh.
"""

import math
import re
from typing import NamedTuple

ITEM_BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32,
             "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Array(NamedTuple):
    """One array. space: of memory, 0 is the device's large one."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes, without the padding of tiles."""
        bits = 8 if self.dtype.startswith("f8") else 4 if self.dtype.startswith("f4") else ITEM_BITS.get(self.dtype, 0)
        return math.ceil(self.elements * bits / 8)


class Instruction(NamedTuple):
    """One line. shape: its arrays, those of a tuple in order. rest: the attributes behind the operands."""

    name: str
    opcode: str
    shape: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    rest: str
    root: bool

    def called(self) -> list[str]:
        """Names of the computations that it runs; for a conditional its branches."""
        branches = _BRANCHES.search(self.rest)
        return _NAME.findall(branches[1]) if branches else _CALLED.findall(self.rest)

    def attribute(self, name: str) -> str:
        """The text of `name={...}` or `name=word`, "" where there is none."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}+|[^,\s]+)", self.rest)
        return found[1] if found else ""


class Computation(NamedTuple):
    """Instructions by name, in the order in which they run."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next(i for i in reversed(self.instructions.values()) if i.root)

    def parameters(self) -> list[Instruction]:
        """In order of their number."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.arguments))

    def users(self) -> dict[str, list[Instruction]]:
        """Which instructions read each."""
        out: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                out.setdefault(name, []).append(instruction)
        return out


class Module(NamedTuple):
    """A whole program."""

    entry: str
    computations: dict[str, Computation]


def parse(text: str) -> Module:
    """The program. Raises ValueError for a text without an entry."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None or not line.startswith(" "):
            head = _HEAD.match(line)
            if head is not None:
                current = computations[head[2]] = Computation(head[2], {})
                entry = head[2] if head[1] else entry
            continue
        made = instruction_of(line)
        if made is not None:
            current.instructions[made.name] = made
    if entry is None:
        raise ValueError("this text is no HLO module: it has no ENTRY computation")
    return Module(entry, computations)


def instruction_of(line: str) -> Instruction | None:
    """One line of a computation, None for other lines."""
    found = _LINE.match(line)
    if found is None:
        return None
    at = found.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    opens = line.index("(", end)
    closes = _closing(line, opens)
    inside = line[opens + 1:closes]
    return Instruction(found[2], line[end:opens].strip(), arrays(line[at:end]), tuple(_NAME.findall(inside)), inside,
                       line[closes + 1:], bool(found[1]))


def _closing(text: str, at: int) -> int:
    """Where the parenthesis that opens at `at` is closed."""
    depth = 0
    for n in range(at, len(text)):
        if text[n] == "(":
            depth += 1
        elif text[n] == ")":
            depth -= 1
            if depth == 0:
                return n
    return len(text) - 1


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a shape, those of nested tuples in order."""
    out = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout or "")
        sizes = tuple(int(n.removeprefix("<=")) for n in dims.split(",") if n)
        out.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(out)


def trips(module: Module, loop: Instruction, inside: Computation) -> int | None:
    """How often a `while` of the computation `inside` runs; None where the program decides it as it runs."""
    known = _TRIPS.search(loop.rest)
    if known:
        return int(known[1])
    condition = module.computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
    compare, where = condition.root, condition
    while compare.opcode == "fusion" and compare.called():  # the comparison may have been fused
        inner = module.computations[compare.called()[0]]
        outer = [where.instructions[name] for name in compare.operands]
        given = {p.name: o for p, o in zip(inner.parameters(), outer, strict=False)}
        compare, where = inner.root, Computation(inner.name, {**where.instructions, **inner.instructions, **given})
    if compare.opcode != "compare" or len(compare.operands) != 2:
        return None
    sides = [_value(where.instructions[name], loop, inside) for name in compare.operands]
    if "direction=GT" in compare.rest:
        sides = sides[::-1]
    elif "direction=LT" not in compare.rest and "direction=LE" not in compare.rest:
        return None
    (start, counts), (limit, changes) = sides
    if limit is None or changes or not counts:
        return None
    return max(0, limit - (start or 0) + ("direction=LE" in compare.rest))


def _value(instruction: Instruction, loop: Instruction, inside: Computation) -> tuple[int | None, bool]:
    """(number, whether it is read from the loop's variables): constants, and what variables start from."""
    if instruction.opcode == "constant":
        return _number(instruction.arguments), False
    if instruction.opcode != "get-tuple-element":
        return None, True
    start = inside.instructions.get(loop.operands[0])
    index = int(instruction.attribute("index"))
    if start is None or start.opcode != "tuple" or index >= len(start.operands):
        return None, True
    first = inside.instructions.get(start.operands[index])
    while first is not None and first.opcode in ("copy", "bitcast", "convert") and first.operands:
        first = inside.instructions.get(first.operands[0])
    return (_number(first.arguments) if first is not None and first.opcode == "constant" else None), True


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d+", text.strip()) else None
