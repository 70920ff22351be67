"""The recurrence of RWKV-7. B batch, T time, H heads, K key size, V value size."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_dtypes, check_shapes, vary_alike
from pallas_kernels.wkv6.api import check_floats, in_order
from pallas_kernels.wkv7 import chunked, pallas_tpu, pallas_triton, reference

Array = jax.Array
_MODULES = {"pallas_tpu": pallas_tpu, "pallas_triton": pallas_triton, "chunked": chunked, "reference": reference}
IMPLEMENTATIONS = tuple(_MODULES)


def wkv7(r: Array, w: Array, k: Array, v: Array, a: Array, b: Array, state: Array | None = None,
         reset: Array | None = None, *,
         implementation: str | tuple[str, ...] | None = None) -> tuple[Array, Array]:
    """Outputs and the final state of

        S_t = diag(exp(w_t)) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T          y_t = S_t^T r_t

    for every row and head; the state S has keys along its rows and values along its columns (the transpose of the
    paper's), S_0 = state. RWKV-7 gives a = -kappa and b = kappa * alpha for unit vectors kappa and alpha in (0, 1); any
    a and b are allowed, and the delta rule is b = -beta a.

    r, k, a, b [B, T, H, K] and v [B, T, H, V] of one dtype. w [B, T, H, K], any float: the logarithm of the decay, at
    most 0 (float32 keeps decays near 1 apart). state [B, H, K, V], any float, zeros when None. reset [B, T] bool: where
    True, S_{t-1} counts as 0 (a document starts).

    Returns y [B, T, H, V] in r's dtype and S_T [B, H, K, V]. There is no scale 1 / sqrt(K). The recurrence and S_T are
    float32, or float64 when r is. Give S_T as the next call's state to continue the rows; T = 1 is decoding.

    implementation: "pallas_tpu", "pallas_triton" (NVIDIA GPUs), "chunked", "reference", a tuple of them to try in turn,
    or None for the first in that order that serves; below 16 positions "chunked" comes first, as the TPU kernel would
    pad them to 128. The kernels have first derivatives; the others have all, and forward mode.

    Raises ValueError for shapes and dtypes that do not fit, T = 0, an unknown implementation and one that cannot serve.
    """
    r, w, k, v, a, b = (jnp.asarray(x) for x in (r, w, k, v, a, b))
    sizes = check_shapes("wkv7", r=(r, "B T H K"), w=(w, "B T H K"), k=(k, "B T H K"), v=(v, "B T H V"),
                         a=(a, "B T H K"), b=(b, "B T H K"))
    dtype = check_dtypes("wkv7", ("float32", "bfloat16", "float16", "float64"), r=r, k=k, v=v, a=a, b=b)
    wide = jnp.promote_types(dtype, jnp.float32)
    state = jnp.zeros([sizes[n] for n in "BHKV"], wide) if state is None else jnp.asarray(state)
    check_shapes("wkv7", r=(r, "B T H K"), v=(v, "B T H V"), state=(state, "B H K V"))
    check_floats("wkv7", w=w, state=state)
    if reset is not None:
        reset = jnp.asarray(reset)
        check_shapes("wkv7", r=(r, "B T H K"), reset=(reset, "B T"))
        check_dtypes("wkv7", ("bool",), reset=reset)
    name = dispatch.choose("wkv7", implementation, in_order({
        "pallas_tpu": functools.partial(pallas_tpu.unsupported, dtype),
        "pallas_triton": functools.partial(pallas_triton.unsupported, dtype, sizes["K"], sizes["V"]),
    }, sizes["T"]))
    return _MODULES[name].forward(*vary_alike(r, w, k, v, a, b, state.astype(wide), reset))
