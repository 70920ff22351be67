"""h_t = a_t h_{t-1} + b_t along time, with resets: the recurrence of minGRU, minLSTM and other gated linear units.

B batch, T time, C channels.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_dtypes, check_shapes, vary_alike
from pallas_kernels.linear_scan import chunked, pallas_mosaic_gpu, pallas_tpu, pallas_triton, reference

Array = jax.Array
_MODULES = {"pallas_tpu": pallas_tpu, "pallas_mosaic_gpu": pallas_mosaic_gpu, "pallas_triton": pallas_triton,
            "chunked": chunked, "reference": reference}
IMPLEMENTATIONS = tuple(_MODULES)


def linear_scan(a: Array, b: Array, h0: Array, *, reset: Array | None = None,
                implementation: str | tuple[str, ...] | None = None) -> tuple[Array, Array]:
    """All states and the last one of h_t = a_t h_{t-1} + b_t, t = 1..T, elementwise from h_0 = h0.

    a, b [B, T, C] of one dtype; h0 [B, C], any float; reset [B, T] bool: where True, h_{t-1} counts as 0 (a document
    starts). Returns h [B, T, C] in b's dtype and h_last [B, C]. The recurrence and h_last are float32, or float64 when
    a and b are. Give h_last as the next call's h0 to continue the rows; T = 1 is decoding.

    implementation: "pallas_tpu", "pallas_mosaic_gpu" (Hopper, Blackwell), "pallas_triton" (other NVIDIA GPUs),
    "chunked", "reference", a tuple of them to try in turn, or None for the first in that order that serves. The kernels
    have first derivatives (a, b, h0); the others have all, and "reference" forward mode.

    Raises ValueError for shapes and dtypes that do not fit, T = 0, an unknown implementation and one that cannot serve.
    """
    a, b, h0 = jnp.asarray(a), jnp.asarray(b), jnp.asarray(h0)
    check_shapes("linear_scan", a=(a, "B T C"), b=(b, "B T C"), h0=(h0, "B C"))
    dtype = check_dtypes("linear_scan", ("float32", "bfloat16", "float16", "float64"), a=a, b=b)
    if not jnp.issubdtype(h0.dtype, jnp.floating):
        raise ValueError(f"linear_scan: h0{list(h0.shape)} has dtype {h0.dtype}; it must be a float")
    if reset is not None:
        reset = jnp.asarray(reset)
        check_shapes("linear_scan", a=(a, "B T C"), reset=(reset, "B T"))
        check_dtypes("linear_scan", ("bool",), reset=reset)
    name = dispatch.choose("linear_scan", implementation, {
        "pallas_tpu": functools.partial(pallas_tpu.unsupported, dtype),
        "pallas_mosaic_gpu": functools.partial(pallas_mosaic_gpu.unsupported, dtype),
        "pallas_triton": functools.partial(pallas_triton.unsupported, dtype),
        "chunked": lambda platform: None,
        "reference": lambda platform: None,
    })
    a, b, h0, reset = vary_alike(a, b, h0.astype(jnp.promote_types(dtype, jnp.float32)), reset)
    return reference.forward(a, b, h0, reset) if name == "reference" else _scan(name, a, b, h0, reset)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(name: str, a: Array, b: Array, h0: Array, reset: Array | None) -> tuple[Array, Array]:
    return _MODULES[name].forward(a, b, h0, reset)


def _scan_forward(name, a, b, h0, reset):
    h, h_last = _scan(name, a, b, h0, reset)
    return (h, h_last), (a, h, h0, reset)


def _scan_backward(name, saved, cotangents):
    a, h, h0, reset = saved
    return (*_MODULES[name].backward(a, h, h0, reset, *cotangents), None)


_scan.defvjp(_scan_forward, _scan_backward)
