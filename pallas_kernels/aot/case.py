"""What an operation tells the proof commands: what to compile, and what it has to cost at least.

To add an operation to `lm kernels matrix` and `lm kernels schedule`, put one file into its folder,
`pallas_kernels/<operation>/full_size.py`, with `CASES`, a tuple of `Case`, and run `lm kernels matrix --write`.
`pallas_kernels/linear_scan/full_size.py` is one to copy. A case has the sizes of a 1.5B model (`BATCH`, `TIME` and
`WIDTH` below, unless they mean nothing to it) and an entry of `work` for each direction, "forward" and "backward":

- forward calls `op(**inputs, **options, implementation=kernel)`,
- backward is the `jax.vjp` of it: gradients to every float array in `inputs`, from cotangents that are arguments too.

Calls of kernels carry names (`pl.pallas_call(..., name=...)`) that begin with those in `calls`, as the program of a
direction must hold them: by default `<op>_forward`, and for the backward `<op>_backward`.
"""

import difflib
import importlib
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

BATCH, TIME, WIDTH = 8, 2048, 2048        # of a 1.5B model with 24 layers
DIRECTIONS = ("forward", "backward")


class Work(NamedTuple):
    """The least that any implementation of a direction has to do, written down before anything is measured.

    bytes: between HBM and the core, each input read once and each output written once. matrix: multiply-adds of the
    matrix unit, sizes padded to its tiles (`product`). vector: float32 operations on elements, counting add, multiply,
    compare and select as one each. transcendental: elements that go through exp, log, reciprocal and the like.
    """
    bytes: int
    matrix: int = 0
    vector: int = 0
    transcendental: int = 0


class Case(NamedTuple):
    """One row of the matrix."""
    name: str                                     # "linear_scan", or with what is special: "linear_scan reset"
    op: Callable                                  # as in the docstring above
    inputs: Mapping[str, Any]                     # pytrees of jax.ShapeDtypeStruct
    kernels: tuple[str, ...]                      # implementations that are device kernels, as `op` names them
    work: Mapping[str, Work]                      # by direction
    elements: int                                 # B T C or what else cycles are divided by, per 1,024 of them
    options: Mapping[str, Any] = {}               # arguments that are no arrays, such as k=16
    calls: Mapping[str, tuple[str, ...]] = {}     # by direction, where names differ from the default
    trips: int | None = None                      # of loops in the kernels whose bound is computed, at these sizes

    def expected_calls(self, direction: str) -> tuple[str, ...]:
        """Beginnings of the names of the kernels that the compiled direction must call."""
        return self.calls.get(direction, (f"{self.op.__name__}_{direction}",))


def array(*shape: int, dtype: Any = "bfloat16") -> jax.ShapeDtypeStruct:
    """An abstract array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def num_bytes(*arrays: Any) -> int:
    """Bytes of pytrees of abstract arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def product(m: int, k: int, n: int, tile: int = 128) -> int:
    """Multiply-adds of [m, k] x [k, n] on the matrix unit: rows padded to 8, k and n to the unit's side."""
    padded = lambda size, to: -(-size // to) * to
    return padded(m, 8) * padded(k, tile) * padded(n, tile)


def operations() -> list[str]:
    """Folders of this package that have a `full_size.py`."""
    return sorted(path.parent.name for path in pathlib.Path(__file__).parent.parent.glob("*/full_size.py"))


def cases(operation: str | None = None) -> list[Case]:
    """Cases of one operation, or of all. Raises ValueError for an unknown name."""
    known = operations()
    if operation is not None and operation not in known:
        near = difflib.get_close_matches(operation, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no kernel operation {operation!r}{hint}; operations: {', '.join(known)}")
    names = known if operation is None else [operation]
    return [case for name in names for case in importlib.import_module(f"pallas_kernels.{name}.full_size").CASES]


def selected(names: Iterable[str]) -> list[Case]:
    """Cases of the named operations; a name may be that of a single case. All of them where none is named.

    Raises ValueError for an unknown name.
    """
    out = [case for name in names for case in (cases(name) if name in operations() else [find_case(name)])]
    return out or cases()


def find_case(name: str) -> Case:
    """The case of that name. Raises ValueError with the nearest for an unknown one."""
    known = {case.name: case for case in cases()}
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no case {name!r}{hint}; cases: {', '.join(known)}")
    return known[name]
