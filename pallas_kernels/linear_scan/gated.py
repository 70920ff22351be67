"""minGRU and minLSTM from their pre-activations: gates and scan in one operation that keeps only h for the backward.

B batch, T time, C channels.
"""

import difflib
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_dtypes, check_shapes, vary_alike
from pallas_kernels.linear_scan import chunked, pallas_mosaic_gpu, pallas_tpu, pallas_triton, reference
from pallas_kernels.linear_scan.gates import ACTIVATIONS, Gates

Array = jax.Array
_MODULES = {"pallas_tpu": pallas_tpu, "pallas_mosaic_gpu": pallas_mosaic_gpu, "pallas_triton": pallas_triton,
            "chunked": chunked}


def min_gru(hidden: Array, gate: Array, h0: Array, *, reset: Array | None = None, activation: str = "g",
            implementation: str | tuple[str, ...] | None = None) -> tuple[Array, Array]:
    """h_t = (1 - z_t) h_{t-1} + z_t act(hidden_t) with z = sigmoid(gate), elementwise from h_0 = h0.

    hidden, gate [B, T, C] of one dtype; h0 [B, C], any float; reset [B, T] bool: where True, h_{t-1} counts as 0.
    activation: "g" (x + 1/2 from 0 on, sigmoid(x) below: positive), "identity" or "tanh". Returns h [B, T, C] in the
    inputs' dtype and h_last [B, C]. Gates, recurrence and h_last are float32, or float64 when the inputs are.

    implementation and errors as in `linear_scan`; the kernels have first derivatives.
    """
    return _gated("min_gru", activation, dict(hidden=hidden, gate=gate), h0, reset, implementation)


def min_lstm(hidden: Array, forget: Array, take: Array, h0: Array, *, reset: Array | None = None,
             activation: str = "g", implementation: str | tuple[str, ...] | None = None) -> tuple[Array, Array]:
    """h_t = f'_t h_{t-1} + i'_t act(hidden_t), f' = f / (f + i) and i' = i / (f + i) with f = sigmoid(forget),
    i = sigmoid(take); the rest as in `min_gru`."""
    return _gated("min_lstm", activation, dict(hidden=hidden, forget=forget, take=take), h0, reset, implementation)


def _gated(op: str, activation: str, given: dict[str, Array], h0: Array, reset: Array | None,
           implementation: str | tuple[str, ...] | None) -> tuple[Array, Array]:
    if activation not in ACTIVATIONS:
        near = difflib.get_close_matches(str(activation), ACTIVATIONS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{op}: no activation {activation!r}{hint}; activations: {', '.join(ACTIVATIONS)}")
    given, h0 = {name: jnp.asarray(x) for name, x in given.items()}, jnp.asarray(h0)
    check_shapes(op, **{name: (x, "B T C") for name, x in given.items()}, h0=(h0, "B C"))
    dtype = check_dtypes(op, ("float32", "bfloat16", "float16", "float64"), **given)
    if not jnp.issubdtype(h0.dtype, jnp.floating):
        raise ValueError(f"{op}: h0{list(h0.shape)} has dtype {h0.dtype}; it must be a float")
    if reset is not None:
        reset = jnp.asarray(reset)
        check_shapes(op, hidden=(given["hidden"], "B T C"), reset=(reset, "B T"))
        check_dtypes(op, ("bool",), reset=reset)
    name = dispatch.choose(op, implementation, {
        "pallas_tpu": functools.partial(pallas_tpu.unsupported, dtype),
        "pallas_mosaic_gpu": functools.partial(pallas_mosaic_gpu.unsupported, dtype),
        "pallas_triton": functools.partial(pallas_triton.unsupported, dtype),
        "chunked": lambda platform: None,
        "reference": lambda platform: None,
    })
    h0, reset, *inputs = vary_alike(h0.astype(jnp.promote_types(dtype, jnp.float32)), reset, *given.values())
    gates = Gates(op, activation)
    if name != "reference":
        return _scan(name, gates, tuple(inputs), h0, reset)
    hidden, *rest = (x.astype(h0.dtype) for x in inputs)
    a, b = reference.UNITS[op](reference.ACTIVATIONS[activation](hidden), *rest)
    h, h_last = reference.forward(a, b, h0, reset)
    return h.astype(dtype), h_last


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(name: str, gates: Gates, inputs: tuple[Array, ...], h0: Array, reset: Array | None) -> tuple[Array, Array]:
    return _MODULES[name].gated_forward(gates, inputs, h0, reset)


def _scan_forward(name, gates, inputs, h0, reset):
    h, h_last = _scan(name, gates, inputs, h0, reset)
    return (h, h_last), (inputs, h, h0, reset)


def _scan_backward(name, gates, saved, cotangents):
    return (*_MODULES[name].gated_backward(gates, *saved, *cotangents), None)


_scan.defvjp(_scan_forward, _scan_backward)
