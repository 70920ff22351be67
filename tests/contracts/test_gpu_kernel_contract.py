"""What every GPU kernel must hold: a row with `gpu_kernels` in `rows_kernels.py` buys these.

Triton kernels are interpreted by every jax; Mosaic GPU's simulator, with its race detector, is there from jax 0.11.
"""

import jax
import numpy as np
import pytest
from rows_kernels import ROWS
from test_kernel_contract import TOLERANCE, assert_close, compute, exact, inputs, with_gradients

from pallas_kernels.gpu_testing import can_interpret, interpreted_gpu

# The default run's: each takes seconds, and Mosaic's simulator several times as many as Triton's.
DEFAULT = {("linear_scan", "pallas_triton"), ("peer_experts", "pallas_triton")}


def cases():
    for row in ROWS:
        for kernel in filter(can_interpret, row.gpu_kernels):
            slow = [(size, dtype) for size in row.slow_gpu_sizes for dtype in ("float32", "bfloat16")]
            for size, dtype in dict.fromkeys((*row.gpu_cases, *slow)):
                fast = (size, dtype) in row.gpu_cases and (row.name, kernel) in DEFAULT
                yield pytest.param(row, kernel, size, dtype, marks=() if fast else pytest.mark.slow,
                                   id=f"{row.name}-{kernel}-{'x'.join(map(str, size))}-{dtype}")


@pytest.mark.parametrize("row,kernel,size,dtype", list(cases()))
def test_gpu_kernel_equals_reference(row, kernel, size, dtype):
    given = inputs(row, size, dtype)
    with interpreted_gpu(kernel):
        got = compute(row, given, kernel)
    want = exact(row, given)
    assert_close(got, want, TOLERANCE[dtype])
    if row.scan:
        assert got[0][-1].dtype == np.float32                           # the final state
        assert_close(got[0][-1:], want[0][-1:], TOLERANCE["float32"])


@pytest.mark.slow
@pytest.mark.parametrize("row,kernel", [pytest.param(row, kernel, id=f"{row.name}-{kernel}") for row in ROWS
                                        for kernel in filter(can_interpret, row.gpu_kernels)])
def test_gpu_kernel_under_vmap(row, kernel):
    several = [inputs(row, row.gpu_cases[0][0], "float32", seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *several)
    with interpreted_gpu(kernel):
        got = jax.block_until_ready(jax.jit(jax.vmap(lambda given: with_gradients(row, given, kernel)))(stacked))
    want = jax.tree.map(lambda *x: np.stack(x), *[compute(row, given, "reference") for given in several])
    assert_close(got, want, TOLERANCE["float32"])
