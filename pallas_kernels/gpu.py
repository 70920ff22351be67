"""Which GPU the computation being traced will run on, and interpreters that stand for one on a CPU.

Pallas has two compilers for NVIDIA GPUs: Mosaic GPU for compute capability 9.x and 10.x (Hopper, Blackwell), and Triton
for 8.0 and up, which jax has declared deprecated. Kernels ask here whether they serve and how they are to run.
"""

import contextlib
import contextvars
import importlib.util
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

Array = jax.Array
Capability = tuple[int, int]
BITS = 32           # resets travel as bits, 32 steps a word


class _Stated(NamedTuple):
    capability: Capability
    triton: bool        # whether Triton kernels are interpreted
    mosaic: Any         # parameters of the interpreter of Mosaic GPU kernels, or None


_stated: contextvars.ContextVar[_Stated | None] = contextvars.ContextVar("pallas_kernels_gpu", default=None)


@contextlib.contextmanager
def stated_gpu(capability: Capability, *, interpret_triton: bool = False,
               interpret_mosaic: Any = None) -> Iterator[None]:
    """Within it, implementations are chosen as on a GPU of this compute capability, (9, 0) for a Hopper: for compilers
    and interpreters on machines without one. interpret_mosaic: an `InterpretGPUParams` of jax 0.11 or later."""
    token = _stated.set(_Stated(capability, interpret_triton, interpret_mosaic))
    try:
        with dispatch.stated_platform("gpu"):
            yield
    finally:
        _stated.reset(token)


def compute_capability() -> Capability | None:
    """That of the stated GPU, else of the first local one; None where there is none, or none of NVIDIA's."""
    stated = _stated.get()
    if stated is not None:
        return stated.capability
    try:
        major, minor = jax.local_devices(backend="cuda")[0].compute_capability.split(".")
        return int(major), int(minor)
    except (RuntimeError, AttributeError, ValueError):
        return None


def no_triton(dtype: str, platform: str, allowed: Iterable[str] = ("float32", "bfloat16")) -> str | None:
    """Why a Triton kernel cannot serve, or None."""
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return f"jax {jax.__version__} carries Pallas-Triton no longer"
    return _unsuited(dtype, platform, allowed, lambda capability: capability >= (8, 0), "8.0 or higher")


def no_mosaic(dtype: str, platform: str, allowed: Iterable[str] = ("float32", "bfloat16")) -> str | None:
    """Why a Mosaic GPU kernel cannot serve, or None."""
    return _unsuited(dtype, platform, allowed, lambda capability: capability[0] in (9, 10), "9.x or 10.x")


def _unsuited(dtype: str, platform: str, allowed: Iterable[str], serves, rule: str) -> str | None:
    if platform != "gpu":
        return f"it needs an NVIDIA GPU and this is {platform}"
    capability = compute_capability()
    if capability is None:
        return "it needs an NVIDIA GPU, and the compute capability of this one is not known"
    if not serves(capability):
        return f"it needs compute capability {rule} and this GPU has {capability[0]}.{capability[1]}"
    if dtype not in allowed:
        return f"it takes {' and '.join(allowed)}, not {dtype}"
    return dispatch.automatic_axes()


def interpret_triton() -> bool:
    """The `interpret` of a Triton kernel's `pl.pallas_call`."""
    stated = _stated.get()
    return stated is not None and stated.triton


def interpret_mosaic() -> dict[str, Any]:
    """Arguments for `plgpu.kernel`: the interpreter, where one is stated."""
    stated = _stated.get()
    return {} if stated is None or stated.mosaic is None else {"interpret": stated.mosaic}


def reset_words(reset: Array) -> Array:
    """[B, ceil(T / 32)] int32 from reset [B, T] bool: bit i of word j says whether step 32 j + i resets."""
    batch, length = reset.shape
    words = -(-length // BITS)
    bits = jnp.pad(reset, ((0, 0), (0, words * BITS - length))).reshape(batch, words, BITS)
    packed = (bits.astype(jnp.uint32) << jnp.arange(BITS, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(packed, jnp.int32)


def like(x: Array, *shape: int, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """What x is, in another shape or dtype if given; inside jax.shard_map with the mesh axes over which x varies."""
    return jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
