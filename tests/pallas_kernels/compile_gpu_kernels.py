"""Compile every GPU kernel of the contract table for a GPU that is not here, and print a JSON line each.

    python tests/pallas_kernels/compile_gpu_kernels.py h100

Needs the wheels of loomlm[aot-gpu]. Run by test_gpu_ahead_of_time.py in a process of its own, one for each GPU.
"""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import compile_kernels
from rows_kernels import ROWS

from pallas_kernels.aot.gpu_compilation import compile_for_gpu, kernels_in
from pallas_kernels.aot.targets import TARGETS


def main(name: str) -> None:
    target = TARGETS[name]
    for row in ROWS:
        for kernel in set(row.gpu_kernels) & set(target.kernels):
            for dtype in ("float32", "bfloat16"):
                given = compile_kernels.shapes(row, dtype)
                for function, num_devices in ((compile_kernels.backward, 1), (compile_kernels.split, 4)):
                    compiled = compile_for_gpu(target.gpu, lambda given, f=function, row=row, kernel=kernel:
                                               f(row, kernel, given), given, num_devices=num_devices)
                    print(json.dumps(dict(row=row.name, op=row.op.__name__, kernel=kernel, dtype=dtype,
                                          direction=function.__name__, calls=kernels_in(compiled))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
