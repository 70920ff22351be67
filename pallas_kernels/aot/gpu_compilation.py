"""Compile for an NVIDIA GPU that is not here, and read what ptxas says: registers and bytes of spilled ones.

It needs the wheels of `loomlm[aot-gpu]`, no GPU, and before jax is imported the environment that
`launch.kernels.process` sets. One kind of GPU a process: Mosaic GPU's ptxas fails on a second.
"""

import importlib.metadata
import pathlib
import re
import subprocess

import jax
import numpy as np
from jax.experimental import topologies

from pallas_kernels import gpu
from pallas_kernels.aot.gpus import Gpu

_CALL = re.compile(r'custom_call_target="(?:mosaic_gpu\w*|__gpu\$xla\.gpu\.triton|triton_kernel_call\w*)"')
_NAME = re.compile(r'op_name="[^"]*?([^"/]+)/(?:pallas_call|mpmd_map|core_map)\b')
_ENTRY = re.compile(r"Compiling entry function '([^']+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
                    r".*?Used (\d+) registers", re.DOTALL)


def compile_for_gpu(kind: Gpu, function, *shapes, num_devices: int = 1) -> jax.stages.Compiled:
    """`function` of `shapes` (pytrees of jax.ShapeDtypeStruct), compiled for `num_devices` GPUs of that kind.

    Every array is split on its first axis over the mesh axis "device". Implementations are chosen as on that GPU.
    """
    topology = topologies.get_topology_desc(platform="cuda", topology_name=kind.product,
                                            target_config=kind.description(), topology=f"1x1x{num_devices}")
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("device",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("device"))
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), shapes)
    with gpu.stated_gpu(kind.capability), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).trace(*placed).lower(lowering_platforms=("cuda",)).compile()


def kernels_in(compiled: jax.stages.Compiled) -> list[str]:
    """Names of the Pallas kernels that the optimized program calls."""
    lines = [line for line in compiled.as_text().splitlines() if _CALL.search(line)]
    return [found[1] for found in map(_NAME.search, lines) if found]


def resources(folder: pathlib.Path, kernels: list[str]) -> dict[str, dict[str, int]]:
    """{kernel: {"registers": a thread, "spills": bytes stored and loaded}} of what was compiled with dumps to `folder`.

    Mosaic GPU writes down what ptxas said; of XLA's own modules, and with jax 0.10 Triton kernels are in them, there is
    the PTX, which ptxas is asked about here. Kernels that left no file, as Triton's since jax 0.11, are left out.
    """
    said = [path.read_text() for path in sorted(folder.glob("*.ptxas"))]
    said += [_ptxas(path) for path in sorted(folder.glob("*.ptx"))
             if not path.with_suffix(".ptxas").exists() and ".entry" in path.read_text()]
    out: dict[str, dict[str, int]] = {}
    for entry, stores, loads, registers in (found for text in said for found in _ENTRY.findall(text)):
        for name in kernels:
            if re.fullmatch(rf"{re.escape(name)}(_mosaic_gpu_kernel|(_\d+)?)", entry):
                one = out.setdefault(name, dict(registers=0, spills=0))
                one["registers"] = max(one["registers"], int(registers))
                one["spills"] += int(stores) + int(loads)
    return out


def _ptxas(path: pathlib.Path) -> str:
    target = re.search(r"^\.target (\w+)", path.read_text(), re.MULTILINE)[1]
    program = next(str(file.locate()) for file in importlib.metadata.files("nvidia-cuda-nvcc") if file.name == "ptxas")
    done = subprocess.run([program, "-v", f"-arch={target}", str(path), "-o", "/dev/null"], capture_output=True,
                          text=True, timeout=300)
    return done.stdout + done.stderr
