"""The recurrence of RWKV-6, and of RWKV-5 where the decay is constant.

B batch, T time, H heads, K key size, V value size.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_dtypes, check_shapes, vary_alike
from pallas_kernels.wkv6 import chunked, pallas_tpu, pallas_triton, reference
from pallas_kernels.wkv6.config import SHORT

Array = jax.Array
_MODULES = {"pallas_tpu": pallas_tpu, "pallas_triton": pallas_triton, "chunked": chunked, "reference": reference}
IMPLEMENTATIONS = tuple(_MODULES)


def wkv6(r: Array, w: Array, k: Array, v: Array, u: Array, state: Array | None = None, reset: Array | None = None, *,
         implementation: str | tuple[str, ...] | None = None) -> tuple[Array, Array]:
    """Outputs and the final state of

        y_t = (S_{t-1} + (u * k_t) v_t^T)^T r_t          S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T

    for every row and head; the state S has keys along its rows and values along its columns, S_0 = state.

    r, k [B, T, H, K] and v [B, T, H, V] of one dtype. w [B, T, H, K], or [H, K] when it is constant (RWKV-5): the
    logarithm of the decay, at most 0, any float (float32 keeps decays near 1 apart; RWKV's own parameter x gives
    w = -exp(x)). u [H, K], or [B, H, K] for one a row: the bonus of the present position, any float.
    state [B, H, K, V], any float, zeros when None. reset [B, T] bool: where True, S_{t-1} counts as 0 (a document
    starts).

    Returns y [B, T, H, V] in r's dtype and S_T [B, H, K, V]. There is no scale 1 / sqrt(K). The recurrence and S_T are
    float32, or float64 when r is. Give S_T as the next call's state to continue the rows; T = 1 is decoding.

    implementation: "pallas_tpu", "pallas_triton" (NVIDIA GPUs), "chunked", "reference", a tuple of them to try in turn,
    or None for the first in that order that serves; below 16 positions "chunked" comes first, as the TPU kernel would
    pad them to 128. The kernels have first derivatives; the others have all, and forward mode.

    Raises ValueError for shapes and dtypes that do not fit, T = 0, an unknown implementation and one that cannot serve.
    """
    r, w, k, v, u = (jnp.asarray(x) for x in (r, w, k, v, u))
    sizes = check_shapes("wkv6", r=(r, "B T H K"), w=(w, "H K" if w.ndim == 2 else "B T H K"), k=(k, "B T H K"),
                         v=(v, "B T H V"), u=(u, "B H K" if u.ndim == 3 else "H K"))
    dtype = check_dtypes("wkv6", ("float32", "bfloat16", "float16", "float64"), r=r, k=k, v=v)
    wide = jnp.promote_types(dtype, jnp.float32)
    state = jnp.zeros([sizes[n] for n in "BHKV"], wide) if state is None else jnp.asarray(state)
    check_shapes("wkv6", r=(r, "B T H K"), v=(v, "B T H V"), state=(state, "B H K V"))
    check_floats("wkv6", w=w, u=u, state=state)
    if reset is not None:
        reset = jnp.asarray(reset)
        check_shapes("wkv6", r=(r, "B T H K"), reset=(reset, "B T"))
        check_dtypes("wkv6", ("bool",), reset=reset)
    name = dispatch.choose("wkv6", implementation, in_order({
        "pallas_tpu": functools.partial(pallas_tpu.unsupported, dtype),
        "pallas_triton": functools.partial(pallas_triton.unsupported, dtype, sizes["K"], sizes["V"]),
    }, sizes["T"]))
    w = jnp.broadcast_to(w, r.shape)
    u = jnp.broadcast_to(u.astype(wide), (sizes["B"], *u.shape[-2:]))
    return _MODULES[name].forward(*vary_alike(r, w, k, v, u, state.astype(wide), reset))


def in_order(kernels: dict[str, dispatch.Check], length: int) -> dict[str, dispatch.Check]:
    """What may serve, best first."""
    rest = {"chunked": lambda platform: None, "reference": lambda platform: None}
    return rest | kernels if length < SHORT else kernels | rest


def check_floats(op: str, **given: Array) -> None:
    """Raises ValueError for one that is not of a floating dtype."""
    for name, x in given.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{op}: {name}{list(x.shape)} has dtype {x.dtype}; it must be a float")
