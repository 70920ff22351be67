"""Check the arguments of an operation: errors name the argument, its shape and the rule."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

Array = jax.Array


def check_shapes(op: str, **given: tuple[Array, str]) -> dict[str, int]:
    """Size of every letter, from arguments given as name=(array, "B T C").

    The first argument that has a letter fixes its size. Raises ValueError for a wrong rank, sizes that differ, and
    size 0.
    """
    sizes: dict[str, int] = {}
    for name, (array, legend) in given.items():
        letters, shape = legend.split(), jnp.shape(array)
        rule = f"it must be [{', '.join(letters)}]"
        if len(shape) != len(letters):
            raise ValueError(f"{op}: {name} has shape {shape}; {rule}")
        for letter, size in zip(letters, shape, strict=True):
            if size != sizes.setdefault(letter, size):
                raise ValueError(f"{op}: {name} has shape {shape}; {rule} with {letter}={sizes[letter]} as in the "
                                 "arguments before it")
            if size == 0:
                raise ValueError(f"{op}: {name} has shape {shape}; {rule} with {letter} at least 1")
    return sizes


def check_dtypes(op: str, allowed: Iterable[str], **given: Array) -> str:
    """The one dtype of all given arrays. Raises ValueError when they differ or the dtype is not allowed."""
    allowed = tuple(allowed)
    first, expected = next((name, jnp.asarray(array).dtype.name) for name, array in given.items())
    for name, array in given.items():
        array = jnp.asarray(array)
        described = f"{op}: {name}{list(array.shape)} has dtype {array.dtype.name}"
        if array.dtype.name not in allowed:
            raise ValueError(f"{described}; allowed: {', '.join(allowed)}")
        if array.dtype.name != expected:
            raise ValueError(f"{described}; it must be that of {first}, {expected}")
    return expected


def vary_alike(*arrays: Array | None) -> tuple[Array | None, ...]:
    """The arrays, all of them varying over every mesh axis of jax.shard_map that one of them varies over.

    Loops and kernels want one type for what they combine; a zero initial state, say, varies over nothing. None passes.
    """
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays if x is not None))
    missing = lambda x: tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
    return tuple(x if x is None or not missing(x) else jax.lax.pcast(x, missing(x), to="varying") for x in arrays)
