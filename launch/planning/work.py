"""The work of a compiled program: every instruction that computes, moves or sends, with how often it runs."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from launch.planning import hlo
from launch.planning.collectives import Collective, collective_of
from launch.planning.hlo import Array, Computation, Instruction, Module
from launch.planning.matrix import Product, product_of
from launch.planning.traffic import Memory

_KERNELS = ("tpu_custom_call", "mosaic_gpu", "triton")
_COST = re.compile(r'"cost_estimate":\{([^}]*)\}')
_FIELD = re.compile(r'"(\w+)":"?(\d+)')
_KERNEL_NAME = re.compile(r'op_name="[^"]*?([^"/]+)/(?:pallas_call|mpmd_map|core_map)\b')


class Kernel(NamedTuple):
    """A call of a Pallas kernel. results, operands: its arrays. cost: the estimate that the call carries, if any:
    flops, transcendentals, bytes_accessed."""

    name: str
    results: tuple[Array, ...]
    operands: tuple[Array, ...]
    cost: dict[str, int]


class Item(NamedTuple):
    """One instruction and what is inside of it. times: how often it runs in a step, as far as loops are known.
    backward: it belongs to the backward pass."""

    name: str
    opcode: str
    times: float
    products: tuple[Product, ...]
    bytes: int
    collectives: tuple[Collective, ...]
    kernel: Kernel | None
    backward: bool

    @property
    def flops(self) -> float:
        """Of its matrix products, once."""
        return sum(product.flops for product in self.products)


class Work(NamedTuple):
    """items: of the whole program. unknown: loops whose trips the program decides as it runs, by name."""

    items: list[Item]
    unknown: list[str]


def work_of(module: Module, *, on_chip: bool, devices: int, unknown_trips: float) -> Work:
    """Everything that one run does on one device. on_chip: see `launch.planning.traffic`. unknown_trips: taken for
    loops that the program decides on. Of the branches of a conditional the one that moves most is taken."""
    unknown: list[str] = []
    walker = _Walker(module, Memory(on_chip), devices, unknown_trips, unknown)
    items = list(walker.walk(module.computations[module.entry], 1.0))
    return Work(items, list(dict.fromkeys(unknown)))


class _Walker:
    def __init__(self, module: Module, memory: Memory, devices: int, unknown_trips: float, unknown: list[str]) -> None:
        self.module, self.memory, self.devices = module, memory, devices
        self.unknown_trips, self.unknown = unknown_trips, unknown

    def walk(self, where: Computation, times: float) -> Iterator[Item]:
        """The items of a computation that runs so often, and of those that it runs."""
        for one in where.instructions.values():
            if one.opcode == "while":
                count = hlo.trips(self.module, one, where)
                if count is None:
                    self.unknown.append(one.name)
                count = self.unknown_trips if count is None else count
                body = self.module.computations[re.search(r"body=%?([\w.\-]+)", one.rest)[1]]
                yield from self.walk(body, times * count)
            elif one.opcode == "conditional":
                branches = [list(self.walk(self.module.computations[name], times)) for name in one.called()]
                yield from max(branches, key=lambda items: sum(i.bytes * i.times + i.flops for i in items), default=[])
            elif one.opcode in ("call", "async-start"):
                for name in one.called():
                    yield from self.walk(self.module.computations[name], times)
            else:
                item = self._item(where, one, times)
                if item is not None:
                    yield item

    def _item(self, where: Computation, one: Instruction, times: float) -> Item | None:
        kernel = kernel_of(where, one)
        products, collectives = self._inside(where, one)
        moved = self.memory.instruction(self.module, where, one)
        if not (moved or products or collectives or kernel):
            return None
        return Item(one.name, one.opcode, times, tuple(products), moved, tuple(collectives), kernel,
                    "transpose(" in one.rest)

    def _inside(self, where: Computation, one: Instruction) -> tuple[list[Product], list[Collective]]:
        """Matrix products and collectives of an instruction and, for a fusion, of all that it fuses."""
        if one.opcode == "fusion":
            products, collectives = [], []
            inner = self.module.computations[one.called()[0]]
            for part in inner.instructions.values():
                more, sent = self._inside(inner, part)
                products += more
                collectives += sent
            return products, collectives
        product = product_of(where, one)
        sent = collective_of(self.module, where, one, self.devices)
        return [product] if product else [], [sent] if sent else []


def kernel_of(where: Computation, one: Instruction) -> Kernel | None:
    """The call of a Pallas kernel, None for other instructions."""
    target = one.attribute("custom_call_target").strip('"') if one.opcode == "custom-call" else ""
    if not any(word in target for word in _KERNELS):
        return None
    cost = _COST.search(one.rest)
    named = _KERNEL_NAME.search(one.rest)
    operands = tuple(a for name in one.operands if name in where.instructions
                     for a in where.instructions[name].shape)
    # On TPUs the instruction has the kernel's name; on GPUs its metadata has.
    name = named[1] if named and "tpu" not in target else re.sub(r"\.\d+.*$", "", one.name)
    return Kernel(name, one.shape, operands,
                  {name: int(n) for name, n in _FIELD.findall(cost[1])} if cost else {})
