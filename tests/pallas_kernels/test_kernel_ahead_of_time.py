"""The TPU compiler accepts every kernel, forward and backward, at full size, and the program calls it."""

import json
import os
import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parent / "compile_kernels.py"


@pytest.mark.parametrize("topology", [
    "v5e:2x2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v4:2x2x1", "v5p:2x2x1", "v6e:2x2",
                                                                        "tpu7x:2x2x1"))])
def test_kernels_compile_for_a_tpu(python_with_libtpu, topology):
    done = subprocess.run([python_with_libtpu, SCRIPT, topology], capture_output=True, text=True, timeout=600,
                          env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"})
    assert done.returncode == 0, done.stderr[-3000:]
    cells = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(cells) % 6 == 0 and cells
    for cell in cells:
        want = ["forward"] if cell["direction"] == "forward" else ["forward", "backward"]
        for direction in want:
            assert any(f"{cell['op']}_{direction}" in call for call in cell["calls"]), cell
