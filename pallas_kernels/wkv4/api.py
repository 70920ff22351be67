"""The WKV operation of RWKV-4: an average of values under weights that decay with time, and a bonus for the newest.

B batch, T time, C channels.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_dtypes, check_shapes, vary_alike
from pallas_kernels.wkv4 import chunked, pallas_mosaic_gpu, pallas_tpu, pallas_triton, reference
from pallas_kernels.wkv4.reference import EMPTY

Array = jax.Array
_MODULES = {"pallas_tpu": pallas_tpu, "pallas_mosaic_gpu": pallas_mosaic_gpu, "pallas_triton": pallas_triton,
            "chunked": chunked, "reference": reference}
IMPLEMENTATIONS = tuple(_MODULES)


def wkv4(w: Array, u: Array, k: Array, v: Array, state: Array | None = None, reset: Array | None = None, *,
         implementation: str | tuple[str, ...] | None = None) -> tuple[Array, Array]:
    """y_t = (N_t + e^(u + k_t) v_t) / (D_t + e^(u + k_t)), channel by channel, and the state after the last step.

    N_t, D_t are the sums over i < t of e^(k_i - (t - 1 - i) w) times v_i, and of these weights alone: the newest past
    step is not decayed. Neither is ever formed: exponents of any size pass, and y_t lies between the smallest and the
    largest v_i.

    w [C]: decay a step, e^-w, in nats; w >= 0, in RWKV-4 exp(time_decay). u [C]: bonus of the newest. k, v [B, T, C]
    of one dtype. state [B, 2, C]: of the past its average N / D and the log of its weight, log D; None is
    `initial_state`. reset [B, T] bool: where True the past is forgotten before the step (a document starts). w, u and
    state: any float.

    Returns y [B, T, C] in v's dtype and the state; the recurrence and the state are float32, or float64 when k and v
    are. Give the state to the next call to continue the rows; T = 1 is decoding. n steps of k = -1e38 leave the average
    as it is and lower the log weight by n w. From a state of RWKV-4 inference code, (num, den, max): the average is
    num / den, the log weight max + log(den).

    implementation: "pallas_tpu", "pallas_mosaic_gpu" (Hopper, Blackwell), "pallas_triton" (other NVIDIA GPUs),
    "chunked", "reference", a tuple of them to try in turn, or None for the first in that order that serves. The kernels
    have first derivatives; the others have all, and "reference" forward mode.

    Raises ValueError for shapes and dtypes that do not fit, T = 0, an unknown implementation and one that cannot serve.
    Source: Peng et al. 2023, arXiv 2305.13048, section 3.1.2 and appendix D.
    """
    w, u, k, v = map(jnp.asarray, (w, u, k, v))
    sizes = check_shapes("wkv4", k=(k, "B T C"), v=(v, "B T C"), w=(w, "C"), u=(u, "C"))
    dtype = check_dtypes("wkv4", ("float32", "bfloat16", "float16", "float64"), k=k, v=v)
    wide = jnp.promote_types(dtype, jnp.float32)
    if state is None:
        state = initial_state(sizes["B"], sizes["C"], wide)
    state = jnp.asarray(state)
    if state.shape != (sizes["B"], 2, sizes["C"]):
        raise ValueError(f"wkv4: state has shape {state.shape}; it must be [B, 2, C] = "
                         f"{(sizes['B'], 2, sizes['C'])}: averages and log weights")
    for name, array in (("w", w), ("u", u), ("state", state)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"wkv4: {name}{list(array.shape)} has dtype {array.dtype}; it must be a float")
    if reset is not None:
        reset = jnp.asarray(reset)
        check_shapes("wkv4", k=(k, "B T C"), reset=(reset, "B T"))
        check_dtypes("wkv4", ("bool",), reset=reset)
    name = dispatch.choose("wkv4", implementation, {
        "pallas_tpu": functools.partial(pallas_tpu.unsupported, dtype),
        "pallas_mosaic_gpu": functools.partial(pallas_mosaic_gpu.unsupported, dtype),
        "pallas_triton": functools.partial(pallas_triton.unsupported, dtype),
        "chunked": lambda platform: None,
        "reference": lambda platform: None,
    })
    # One w and u a row: under jax.vmap more rows, too; the transpose of this broadcast sums their gradients over rows.
    w, u = (jnp.broadcast_to(x.astype(wide), (sizes["B"], sizes["C"])) for x in (w, u))
    arrays = vary_alike(w, u, k, v, state.astype(wide), reset)
    return reference.forward(*arrays) if name == "reference" else _wkv4(name, *arrays)


def initial_state(batch_size: int, width: int, dtype=jnp.float32) -> Array:
    """The state [B, 2, C] of no past: average 0, log weight -1e30."""
    return jnp.zeros((batch_size, 2, width), dtype).at[:, 1].set(EMPTY)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wkv4(name: str, w: Array, u: Array, k: Array, v: Array, state: Array,
          reset: Array | None) -> tuple[Array, Array]:
    return _MODULES[name].forward(w, u, k, v, state, reset)


def _wkv4_forward(name, w, u, k, v, state, reset):
    y, last, starts = _MODULES[name].forward_saving(w, u, k, v, state, reset)
    return (y, last), (w, u, k, v, reset, starts, last)


def _wkv4_backward(name, saved, cotangents):
    return (*_MODULES[name].backward(*saved, *cotangents), None)


_wkv4.defvjp(_wkv4_forward, _wkv4_backward)
