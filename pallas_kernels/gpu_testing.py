"""Run GPU kernels without a GPU: Triton kernels as plain XLA, Mosaic GPU kernels in the simulator of jax 0.11 and up.

`pallas_kernels.aot.gpu_compilation` compiles them.
"""

import contextlib
from collections.abc import Iterator

import jax

from pallas_kernels.gpu import stated_gpu

# What each kernel is made for: the automatic choice on a GPU of this compute capability is that kernel.
CAPABILITIES = {"pallas_triton": (8, 0), "pallas_mosaic_gpu": (9, 0)}


def can_interpret(kernel: str) -> bool:
    """Whether this jax has an interpreter for kernels of that name."""
    if kernel == "pallas_triton":
        return True
    from jax.experimental.pallas import mosaic_gpu as plgpu
    return hasattr(plgpu, "InterpretGPUParams")


@contextlib.contextmanager
def interpreted_gpu(kernel: str) -> Iterator[None]:
    """Within it, operations choose as on a GPU that `kernel` is made for, and it runs interpreted on the CPU.

    Mosaic GPU: memory that nothing wrote holds NaN, and a race of threads or copies raises RuntimeError. Computations
    have to be traced and finished (`jax.block_until_ready`) inside.
    """
    simulate = None
    if kernel == "pallas_mosaic_gpu":
        from jax.experimental.pallas import mosaic_gpu as plgpu
        simulate = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    with stated_gpu(CAPABILITIES[kernel], interpret_triton=True, interpret_mosaic=simulate):
        yield
        jax.effects_barrier()
