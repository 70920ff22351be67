"""GPU compilers accept every kernel, backward and inside of jax.shard_map, at full size, and the program calls it."""

import json
import os
import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parent / "compile_gpu_kernels.py"


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["a100", "h100", "b200"])
def test_kernels_compile_for_a_gpu(python_with_cuda, gpu):
    done = subprocess.run([python_with_cuda, SCRIPT, gpu], capture_output=True, text=True, timeout=900,
                          env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"})
    assert done.returncode == 0, done.stderr[-3000:]
    cells = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(cells) % 4 == 0 and cells
    for cell in cells:
        for direction in ("forward", "backward"):
            assert f"{cell['op']}_{direction}" in cell["calls"], cell
