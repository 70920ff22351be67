"""Compile every kernel of the contract table for a TPU topology that is not here, and print a JSON line each.

    python tests/pallas_kernels/compile_kernels.py v5e:2x2

Needs libtpu. Run by test_kernel_ahead_of_time.py in a process of its own: libtpu reads its settings once.
"""

import json
import os
import pathlib
import sys

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "contracts")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from rows_kernels import ROWS  # noqa: E402

from pallas_kernels.testing import compile_for_tpu, kernels_in  # noqa: E402


def shapes(row, dtype: str) -> dict:
    """The inputs of the row's full size, by way of its smallest one: only letters' sizes differ, others stay."""
    small, full = row.sizes[0], row.full_size
    letters = dict(zip(small, full, strict=True))
    return {name: jax.ShapeDtypeStruct(tuple(letters.get(size, size) for size in x.shape),
                                       x.dtype if x.dtype != np.float64 else dtype if name in row.narrow else "float32")
            for name, x in row.make(np.random.default_rng(0), *small).items()}


def forward(row, kernel, given):
    return row.op(**given, implementation=kernel)


def backward(row, kernel, given):
    """Gradients of every output summed in squares; XLA cannot drop what they need."""
    def loss(floats):
        out = row.op(**(given | floats), implementation=kernel)
        return sum((x.astype(jnp.float32) ** 2).sum() for x in jax.tree.leaves(out))

    return jax.grad(loss)({name: x for name, x in given.items() if jnp.issubdtype(x.dtype, jnp.floating)})


def split(row, kernel, given):
    """Each device its rows, and all of what has no batch; gradients included."""
    specs = {name: jax.sharding.PartitionSpec(*["device"] * (x.shape[0] == row.full_size[0]))
             for name, x in given.items()}
    floats = {name: specs[name] for name, x in given.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return jax.shard_map(lambda given: backward(row, kernel, given), in_specs=(specs,), out_specs=floats)(given)


def main(topology: str) -> None:
    for row in ROWS:
        for kernel in row.kernels:
            for dtype in ("float32", "bfloat16"):
                given = shapes(row, dtype)
                for direction, num_devices in ((forward, 1), (backward, 1), (split, 4)):
                    compiled = compile_for_tpu(topology, lambda given, f=direction, row=row, kernel=kernel:
                                               f(row, kernel, given), given, num_devices=num_devices)
                    print(json.dumps(dict(row=row.name, op=row.op.__name__, kernel=kernel, dtype=dtype,
                                          direction=direction.__name__, calls=kernels_in(compiled),
                                          temporaries=compiled.memory_analysis().temp_size_in_bytes)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
