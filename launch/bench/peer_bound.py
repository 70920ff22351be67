"""The least that the PEER layer of `lm bench kernels` can take on this machine: `python -m launch.bench.peer_bound`.

Bytes: the chosen rows are read once forward and once backward (to keep them would be a write and a read more), and the
dense gradient of the table is written once. FLOPs: queries, scores of the sub-keys and experts, forward and backward.
Both are divided by what this machine does with all its cores: memory as read and written by copies of large arrays,
products as of two large float32 matrices. Nothing is counted for choosing the best keys, which is neither.
"""

import concurrent.futures
import math
import os
import sys
import time

import numpy as np

from launch.bench.peer import BATCH, CHOSEN, HEADS, TIME, WIDTH

EXPERTS = (65_536, 262_144)
COPY_MIB, SIDE, ROUNDS = 256, 2048, 7


def least_bytes(experts: int) -> float:
    """Of one forward and backward pass, where tokens choose at random."""
    pairs = BATCH * TIME * HEADS * CHOSEN
    touched = experts * -math.expm1(-pairs / experts)
    return 4 * 2 * WIDTH * (2 * touched + experts)


def flops(experts: int) -> float:
    """Of one forward and backward pass; PEER-pytorch's queries are as wide as the model."""
    tokens, root = BATCH * TIME, math.isqrt(experts)
    return 3 * 2.0 * tokens * HEADS * WIDTH * (WIDTH + root + 2 * CHOSEN)


def bandwidth(cores: int) -> float:
    """Bytes a second, read and written, of copies by all cores; the best of some rounds."""
    arrays = [(np.zeros(COPY_MIB * 2**20 // 8), np.ones(COPY_MIB * 2**20 // 8)) for _ in range(cores)]
    best = 0.0
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(*pair), arrays))
            best = max(best, 2 * cores * COPY_MIB * 2**20 / (time.perf_counter() - begin))
    return best


def product_speed() -> float:
    """FLOPs a second of a large float32 product in JAX; the best of some rounds."""
    import jax
    import jax.numpy as jnp
    product, a = jax.jit(lambda a: a @ a), jnp.ones((SIDE, SIDE))
    best = 0.0
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        jax.block_until_ready(product(a))
        best = max(best, 2.0 * SIDE**3 / (time.perf_counter() - begin))
    return best


def main() -> int:
    """Prints the table."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    cores = len(os.sched_getaffinity(0))
    speed, rate = bandwidth(cores), product_speed()
    print(f"{cores} cores: {speed / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOP/s")
    for experts in EXPERTS:
        memory, compute = least_bytes(experts) / speed, flops(experts) / rate
        print(f"{experts:,} experts: {least_bytes(experts) / 1e6:.0f} MB, {1e3 * memory:.0f} ms; "
              f"{flops(experts) / 1e9:.1f} GFLOP, {1e3 * compute:.0f} ms; at the same time "
              f"{1e3 * max(memory, compute):.0f} ms, one after the other {1e3 * (memory + compute):.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
