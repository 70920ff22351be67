"""The table of kernel operations under contract. A new operation adds its row here.

The inputs of an operation are a dict of numpy arrays, floats in float64 and the rest as the operation takes them;
`op(**inputs, implementation=name)` gives one array or a tuple of them.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from pallas_kernels.linear_scan import linear_scan


class Scan(NamedTuple):
    """What a recurrence promises besides: pieces that hand on the state equal the whole, and documents are separate."""
    time: tuple[str, ...]               # inputs with time on axis 1; the first output has it too
    state: str                          # the input that the last output continues
    reset: str | None = "reset"


class Row(NamedTuple):
    name: str
    op: Callable
    oracle: Callable                    # numpy only, written from the formula, float64
    make: Callable[..., Mapping]        # make(rng, *size) -> inputs
    sizes: tuple[tuple[int, ...], ...]  # odd lengths, length 1, widths off the tile
    kernels: tuple[str, ...]            # implementations that are device kernels
    kernel_cases: tuple[tuple[tuple[int, ...], str], ...]   # (size, dtype): few, as the interpreter takes seconds each
    slow_kernel_sizes: tuple[tuple[int, ...], ...]          # in both dtypes
    full_size: tuple[int, ...]          # as in a 1.5B model: what is compiled ahead of time
    scan: Scan | None = None
    narrow: tuple[str, ...] = ()        # inputs that follow the compute dtype; other floats stay float32


def linear_scan_inputs(rng: np.random.Generator, batch: int, time: int, width: int) -> dict:
    reset = rng.random((batch, time)) < 0.1
    return dict(a=rng.random((batch, time, width)), b=rng.normal(size=(batch, time, width)),
                h0=rng.normal(size=(batch, width)), reset=reset)


def without_reset(make: Callable) -> Callable:
    return lambda rng, *size: {name: x for name, x in make(rng, *size).items() if name != "reset"}


def linear_scan_oracle(a, b, h0, reset=None):
    h, out = np.array(h0, np.float64), np.zeros(b.shape)
    for t in range(a.shape[1]):
        for row in np.flatnonzero(reset[:, t]) if reset is not None else ():
            h[row] = 0
        h = a[:, t] * h + b[:, t]
        out[:, t] = h
    return out, h


ROWS = [
    Row("linear_scan", linear_scan, linear_scan_oracle, linear_scan_inputs,
        sizes=((2, 13, 5), (3, 1, 4), (1, 8, 3), (2, 64, 1)),
        kernels=("pallas_tpu",), kernel_cases=(((2, 7, 5), "float32"), ((1, 523, 130), "bfloat16")),
        slow_kernel_sizes=((2, 7, 5), (3, 1, 130), (1, 16, 520), (2, 128, 128), (9, 33, 1), (1, 523, 130)),
        full_size=(8, 2048, 2048), scan=Scan(time=("a", "b", "reset"), state="h0"), narrow=("a", "b")),
    Row("linear_scan_without_reset", linear_scan, linear_scan_oracle, without_reset(linear_scan_inputs),
        sizes=((2, 13, 5),), kernels=("pallas_tpu",), kernel_cases=(((3, 1, 130), "float32"),),
        slow_kernel_sizes=((1, 523, 130),), full_size=(8, 2048, 2048),
        scan=Scan(time=("a", "b"), state="h0", reset=None), narrow=("a", "b")),
]
