"""The k best of n * n product keys: what PEER and product key memories retrieve.

B batch, T time, H heads, K size of a sub-key, n sub-keys of each half, k kept.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_dtypes, check_shapes, vary_alike
from pallas_kernels.product_key_topk import chunked, pallas_mosaic_gpu, pallas_tpu, pallas_triton, reference

Array = jax.Array
_MODULES = {"pallas_tpu": pallas_tpu, "pallas_mosaic_gpu": pallas_mosaic_gpu, "pallas_triton": pallas_triton,
            "chunked": chunked, "reference": reference}
IMPLEMENTATIONS = tuple(_MODULES)
MOST_SUB_KEYS = math.isqrt(2 ** 31)      # ids are int32


def product_key_topk(q1: Array, q2: Array, c1: Array, c2: Array, k: int, *,
                     implementation: str | tuple[str, ...] | None = None) -> tuple[Array, Array]:
    """Scores and ids of the k keys (i, j) with the largest q1 . c1[i] + q2 . c2[j], best first; id = i * n + j.

    q1, q2 [B, T, H, K], the halves of the queries; c1, c2 [n, K], the sub-keys that all heads share, or [H, n, K] for
    keys of each head's own; all of one dtype. Returns scores [B, T, H, k], float32 or float64 as the inputs, and ids
    [B, T, H, k] int32. Exact: the same as the k best of all n * n sums. Scores are never rounded to bfloat16, in which
    ties are common.

    Ties go to the larger first half, then to the smaller i, then to the smaller j (README.md says why), in every
    implementation. Scores have gradients to queries and sub-keys; ids have none.

    implementation: "pallas_tpu", "pallas_mosaic_gpu" (Hopper, Blackwell), "pallas_triton" (other NVIDIA GPUs),
    "chunked", "reference", a tuple of them to try in turn, or None for the first in that order that serves. The kernels
    have first derivatives only.

    Raises ValueError for shapes and dtypes that do not fit, c1 and c2 of different n, k outside 1..n, more than 46,340
    sub-keys (ids are int32), and an implementation that is unknown or cannot serve.
    """
    q1, q2, c1, c2 = map(jnp.asarray, (q1, q2, c1, c2))
    op = "product_key_topk"
    keys = "H n K" if c1.ndim == 3 else "n K"
    if c1.ndim == c2.ndim and c1.ndim in (2, 3) and c1.shape[-2] != c2.shape[-2]:
        raise ValueError(f"{op}: c1 has shape {c1.shape} and c2 {c2.shape}; the number of experts must be a square, "
                         f"n * n, so both need the same n; not {c1.shape[-2]} and {c2.shape[-2]}")
    sizes = check_shapes(op, q1=(q1, "B T H K"), q2=(q2, "B T H K"), c1=(c1, keys), c2=(c2, keys))
    dtype = check_dtypes(op, ("float32", "bfloat16", "float16", "float64"), q1=q1, q2=q2, c1=c1, c2=c2)
    n = sizes["n"]
    if n > MOST_SUB_KEYS:
        raise ValueError(f"{op}: c1 has shape {c1.shape}; n is at most {MOST_SUB_KEYS}, as ids up to n * n are int32")
    k = operator.index(k)
    if not 1 <= k <= n:
        raise ValueError(f"{op}: k={k}; it must be from 1 to n={n}, the number of sub-keys in c1 {c1.shape}")
    name = dispatch.choose(op, implementation, {
        "pallas_tpu": functools.partial(pallas_tpu.unsupported, dtype, n),
        "pallas_mosaic_gpu": functools.partial(pallas_mosaic_gpu.unsupported, dtype, k, sizes["K"]),
        "pallas_triton": functools.partial(pallas_triton.unsupported, dtype, k),
        "chunked": lambda platform: None,
        "reference": lambda platform: None,
    })
    q1, q2, c1, c2 = vary_alike(q1, q2, c1, c2)
    if name == "reference":
        return reference.forward(q1, q2, c1, c2, k)
    if dispatch.automatic_axes() is None:      # else B may be split over devices, and stays an axis of its own
        q1, q2 = (q.reshape(1, -1, *q.shape[2:]) for q in (q1, q2))
    out = _topk(name, k, q1, q2, c1, c2)
    return jax.tree.map(lambda x: x.reshape(sizes["B"], sizes["T"], sizes["H"], k), out)


def num_sub_keys(num_experts: int) -> int:
    """n of num_experts = n * n. Raises ValueError, with the nearest squares, when there is none."""
    n = math.isqrt(max(num_experts, 0))
    if num_experts < 1 or n * n != num_experts:
        near = f"{n * n} or {(n + 1) ** 2}" if n else "1"
        raise ValueError(f"num_experts={num_experts} is not a square n * n with n >= 1, as product keys need; "
                         f"nearest: {near}")
    return n


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _topk(name: str, k: int, q1: Array, q2: Array, c1: Array, c2: Array) -> tuple[Array, Array]:
    return _MODULES[name].forward(q1, q2, c1, c2, k)


def _topk_forward(name, k, q1, q2, c1, c2):
    scores, ids = _topk(name, k, q1, q2, c1, c2)
    return (scores, ids), (q1, q2, c1, c2, ids)


def _topk_backward(name, k, saved, cotangents):
    return _MODULES[name].backward(*saved, cotangents[0])


_topk.defvjp(_topk_forward, _topk_backward)
