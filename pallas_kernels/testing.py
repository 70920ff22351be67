"""Run TPU kernels without a TPU: the interpreter with its race detector, and the compiler ahead of time."""

import contextlib
import functools
import importlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.interpreters import mlir

from pallas_kernels.dispatch import stated_platform

_STATE = "jax._src.pallas.mosaic.interpret.interpret_pallas_call"


class RaceFoundError(RuntimeError):
    """Two accesses of the same memory with no order between them, at least one of them a write."""


@contextlib.contextmanager
def interpreted_tpu() -> Iterator[None]:
    """Within it, operations choose as on a TPU and their kernels run in the TPU interpreter on the CPU.

    Memory that nothing wrote holds NaN. Raises RaceFoundError, at the end at the latest, when the detector saw a race:
    jax 0.10 only prints it and sets a flag of a private module, later ones raise where it happens. Computations have to
    be traced and finished (`jax.block_until_ready`) inside.
    """
    _teach_packing()
    pltpu.reset_tpu_interpret_mode_state()
    simulate = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    try:
        with stated_platform("tpu"), pltpu.force_tpu_interpret_mode(simulate):
            yield
            jax.effects_barrier()
        races = importlib.import_module(_STATE).races
        if races is not None and races.races_found:
            raise RaceFoundError("the TPU interpreter found a race; it printed where")
    except Exception as error:
        if "RACE DETECTED" in str(error):
            raise RaceFoundError(str(error)) from error
        raise
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@functools.cache
def _teach_packing() -> None:
    """Makes `pltpu.pack_elementwise` of two float32 arrays run on CPUs, which the interpreter cannot by itself."""
    def pack(low, high, *, packed_dtype):
        low, high = (jax.lax.bitcast_convert_type(x.astype(packed_dtype), jnp.uint16).astype(jnp.uint32)
                     for x in (low, high))
        return low | (high << 16)

    some = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    traced = jax.make_jaxpr(lambda x, y: pltpu.pack_elementwise([x, y], packed_dtype=jnp.bfloat16))(some, some)
    mlir.register_lowering(traced.eqns[0].primitive, mlir.lower_fun(pack, multiple_results=False), platform="cpu")


def compile_for_tpu(topology: str, function, *shapes, num_devices: int = 1) -> jax.stages.Compiled:
    """`function` of `shapes` (pytrees of jax.ShapeDtypeStruct), compiled for a TPU topology such as "v5e:2x2".

    Every array is split on its first axis over `num_devices`, the mesh axis "device".

    Needs libtpu, no TPU, and before jax is imported the environment JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1
    TPU_WORKER_HOSTNAMES=localhost. Implementations are chosen as on that device.
    """
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:num_devices]
    mesh = jax.sharding.Mesh(np.array(devices), ("device",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("device"))
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), shapes)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*placed).compile()


def kernels_in(compiled: jax.stages.Compiled) -> list[str]:
    """Names of the Pallas kernels that the optimized program calls."""
    calls = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    return [line.split("=")[0].strip().removeprefix("ROOT ").lstrip("%").split(".")[0] for line in calls]
