"""FLOPs of matrix products in a compiled program: dots, convolutions, and what GPU libraries are called for."""

import json
import math
import re
from typing import NamedTuple

from launch.planning.hlo import Computation, Instruction

# Products of bfloat16 that one of float32 is made of on the matrix unit, by the precision that was asked for.
PASSES = {"default": 1, "high": 3, "highest": 6}
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)")
_GEMM = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8")


class Product(NamedTuple):
    """flops, of operands of this dtype, each of which the unit runs `passes` times."""

    flops: float
    dtype: str
    passes: int


def product_of(where: Computation, instruction: Instruction) -> Product | None:
    """None for an instruction that is no matrix product."""
    if instruction.opcode not in ("dot", "convolution", "custom-call"):
        return None
    if instruction.opcode == "custom-call" and instruction.attribute("custom_call_target").strip('"') not in _GEMM:
        return None
    shapes = [where.instructions[name].shape[0] for name in instruction.operands[:2]]
    flops = (_convolution if instruction.opcode == "convolution" else _dot)(instruction, *shapes)
    wide = "f32" in (shapes[0].dtype, shapes[1].dtype)
    asked = re.search(r"operand_precision=\{(\w+)", instruction.rest)
    return Product(flops, "f32" if wide else shapes[0].dtype, PASSES[asked[1]] if asked and wide else 1)


def _dot(instruction: Instruction, left, right) -> float:
    """2 x elements of the result x the length that is summed over."""
    text = instruction.rest
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", text)
    if found is not None:
        summed = [int(n) for n in found[1].split(",") if n]
    else:  # a library's call has the numbers in its configuration
        found = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', text)
        summed = [int(n) for n in json.loads(found[1])] if found else [len(left.dims) - 1]
    return 2.0 * instruction.shape[0].elements * math.prod(left.dims[n] for n in summed)


def _convolution(instruction: Instruction, left, right) -> float:
    """2 x batch x out features x in features of a group x pairs of places that meet, side by side: batch dimensions of
    a matrix product are spatial ones here, where most pairs meet padding and are not counted."""
    lhs, rhs, out = _LABELS.search(instruction.rest).groups()
    result = instruction.shape[0]
    of = lambda labels, shape, which: math.prod(n for label, n in zip(labels, shape.dims, strict=True)
                                                if label == which)
    flops = 2.0 * of(out, result, "b") * of(out, result, "f") * of(rhs, right, "i")
    window = _window(instruction.rest)
    for label in sorted(set(lhs) - {"b", "f"}):
        flops *= _meetings(of(out, result, label), of(rhs, right, label), of(lhs, left, label), window, int(label))
    return flops / int(instruction.attribute("batch_group_count") or 1)


def _window(text: str) -> dict[str, list[str]]:
    found = _WINDOW.search(text)
    return {name: value.split("x") for name, value in re.findall(r"(\w+)=([\w\-]+)", found[1])} if found else {}


def _meetings(out: int, kernel: int, places: int, window: dict[str, list[str]], at: int) -> int:
    """How many (output, kernel) pairs along one side read an element that is there."""
    value = lambda name, default: int(window[name][at]) if name in window else default
    low = int(window["pad"][at].split("_")[0]) if "pad" in window else 0
    stride, dilate, spread = value("stride", 1), value("lhs_dilate", 1), value("rhs_dilate", 1)
    count = 0
    for k in range(kernel):
        # o * stride + k * spread - low must be a multiple of dilate from 0 to (places - 1) * dilate
        first = k * spread - low
        for o in range(out) if dilate > 1 else ():
            place = o * stride + first
            count += place % dilate == 0 and 0 <= place <= (places - 1) * dilate
        if dilate == 1:
            begin = max(0, math.ceil(-first / stride))
            end = min(out - 1, math.floor((places - 1 - first) / stride))
            count += max(0, end - begin + 1)
    return count
