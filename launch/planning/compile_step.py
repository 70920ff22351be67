"""Compile a program of a run for a machine that is not here, and say in JSON what a device would hold.

    python -m launch.planning.compile_step FILE.json

A process of its own, with the environment of `launch.kernels.process`. FILE holds what `lm plan` has resolved: target,
mesh (sizes of a slice, and dcn), vocab_size, special (ids without text), teacher_k, the groups model, loss, optimizer
and train of the config, decode (None, or rows and their room) and program: where the compiled text goes, compressed.
"""

import contextlib
import gzip
import itertools
import json
import logging
import re
import sys
import time
import traceback
from typing import Any

import jax
from jax.experimental import topologies

from launch.planning.machines import GPUS_A_HOST, Machine, find_machine
from launch.planning.program import decode_step, train_step
from lm.core.sharding import make_mesh
from pallas_kernels import gpu
from pallas_kernels.aot.compilation import short_reason

# "Ran out of memory in memory space hbm. Used 18.25G of 15.75G hbm." counts all, and "the total memory required for HLO
# temporaries (40.00G) exceeds available HBM (15.75G)" no arguments.
_USED = re.compile(r"[Uu]sed ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
_TEMPORARIES = re.compile(r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def devices_of(machine: Machine) -> list[Any]:
    """Devices to compile for."""
    kind = machine.kind
    if machine.kind.name == "cpu":
        return jax.devices()[:machine.devices]
    if kind.gpu is not None:
        return list(topologies.get_topology_desc(platform="cuda", topology_name=kind.gpu.product,
                                                 target_config=kind.gpu.description(),
                                                 topology=machine.topology).devices)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=machine.topology,
                                             **machine.topology_options()).devices)


def compile_step(asked: dict[str, Any]) -> dict[str, Any]:
    """Bytes a device by kind, and `seconds` of tracing, lowering and compiling. Compilers raise theirs."""
    machine = find_machine(asked["target"])
    mesh = make_mesh(asked["mesh"], dcn=asked["dcn"], devices=devices_of(machine))
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
        if machine.kind.gpu is not None:
            stack.enter_context(gpu.stated_gpu(machine.kind.gpu.capability))
        times = [time.perf_counter()]
        program = (train_step if asked["decode"] is None else decode_step)(asked, mesh)
        times.append(time.perf_counter())
        logging.info("traced in %.1f s", times[1] - times[0])
        traced = program.traced
        lowered = traced.lower(lowering_platforms=("cuda",)) if machine.kind.gpu is not None else traced.lower()
        times.append(time.perf_counter())
        logging.info("lowered in %.1f s", times[2] - times[1])
        try:
            compiled = lowered.compile()
        except Exception as error:
            found = out_of_memory(error, program.held)
            if found is None:
                raise
            return found
        times.append(time.perf_counter())
        logging.info("compiled in %.1f s", times[3] - times[2])
    with gzip.open(asked["program"], "wt", compresslevel=3) as file:
        file.write(compiled.as_text())
    memory, held, costs = compiled.memory_analysis(), program.held, compiled.cost_analysis() or {}
    granules = [granule(device) for device in mesh.devices.flat]
    return dict(status="ok", granules=granules if len(set(granules)) > 1 else [],
                xla={name: costs[name] for name in ("flops", "bytes accessed", "optimal_seconds") if name in costs},
                **held, batch=memory.argument_size_in_bytes - sum(held.values()),
                temporaries=memory.temp_size_in_bytes, generated=memory.generated_code_size_in_bytes,
                not_in_place=memory.output_size_in_bytes - memory.alias_size_in_bytes,
                seconds={name: b - a for name, (a, b) in zip(("trace", "lower", "compile"), itertools.pairwise(times),
                                                             strict=True)})


def granule(device: Any) -> int:
    """The slice of a TPU, or the host of a GPU."""
    return device.id // GPUS_A_HOST if device.platform in ("cuda", "gpu") else getattr(device, "slice_index", 0)


def out_of_memory(error: BaseException, held: dict[str, int]) -> dict[str, Any] | None:
    """{"status": "too large", used, usable} with what is held: what the compiler said that it needs, in bytes a device;
    None for other errors."""
    found, more = _USED.search(str(error)), 0
    if found is None:
        found, more = _TEMPORARIES.search(str(error)), sum(held.values())
    if found is None:
        return None
    size = lambda number, unit: int(float(number) * _UNITS[unit])
    return dict(status="too large", used=size(*found.groups()[:2]) + more, usable=size(*found.groups()[2:]),
                reason=short_reason(error), **held)


def main(arguments: list[str]) -> int:
    """Prints the result as the last line of the standard output."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with open(arguments[0]) as file:
        asked = json.load(file)
    try:
        result = compile_step(asked)
    except Exception as error:  # whatever a compiler raises is the answer that was asked for
        traceback.print_exc()
        result = dict(status="refused", reason=short_reason(error))
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
