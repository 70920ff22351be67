"""GPU compilers accept every kernel, backward and inside of jax.shard_map, at full size, and the program calls it."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / "compile_gpu_kernels.py"


@pytest.fixture(scope="session")
def python_with_cuda() -> str:
    """This interpreter if the CUDA plugin is installed in it, else the one that LOOMLM_TEST_CUDA_PYTHON names."""
    if importlib.util.find_spec("jax_cuda13_plugin"):
        return sys.executable
    other = os.environ.get("LOOMLM_TEST_CUDA_PYTHON")
    if not other:
        pytest.skip("needs pip install 'loomlm[aot-gpu]', or LOOMLM_TEST_CUDA_PYTHON set to a python that has it")
    return other


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
