"""Block sliding-window attention: one operation, several implementations, and a loud choice between them.

Shape legend: as `bands`; P keys of before the call.
"""

import functools
import logging

import jax
import jax.numpy as jnp

from lm.core.fields import did_you_mean
from lm.core.sharding import axis_size, platform
from lm.layers.attention_op import splash
from lm.layers.block_sliding import bands
from lm.layers.block_sliding.bands import Columns, Keys, Queries
from lm.layers.block_sliding.shards import TIME, over_shards

Array = jax.Array
log = logging.getLogger(__name__)

IMPLEMENTATIONS = ("splash", "cudnn", "xla", "reference")  # in the order in which None tries them


def block_sliding_attention(q: Queries, new: Keys, past: Keys, *, block: int, behind: int, stop_gradient: bool = False,
                            columns: Columns | None = None, row_memory: int | None = None,
                            implementation: str | None = None) -> Array:
    """softmax(q k^T / sqrt(K)) v over the keys that each query sees: [B, T, H, K] in q's dtype, softmax in float32.

    Query i sees key j where j is of its document and first_i <= order_j <= order_i.

    new: keys of the T tokens themselves. past: P of before the call. With more than one chunk they stand in order, P is
    behind * block or 0, and padding among the new ones only at the end of a row. block: tokens of a chunk. behind:
    chunks before its own that a query may look into. stop_gradient: none flows into keys and values before the query's
    block. columns: further keys of each chunk. row_memory: the blocks of memory where blocks are cut by the row and
    nothing is past, so that the mask is static, which the splash kernel needs; else None.

    Raises ValueError for an implementation that is unknown or cannot serve.
    """
    name = choose(q, new, past, stop_gradient, columns, row_memory, implementation)
    if name == "splash":
        return splash.attend_blocks(q.queries, new.keys, new.values, (q.document, new.document), (block, row_memory))
    if name == "reference":
        return bands.attend(q, new, past, columns, block=q.order.shape[1], behind=0, stop_gradient=stop_gradient,
                            fused=False)
    local = functools.partial(bands.attend, stop_gradient=stop_gradient, fused=name == "cudnn")
    return over_shards(local, q, new, past, columns, block=block, behind=behind)


def choose(q: Queries, new: Keys, past: Keys, stop_gradient: bool, columns: Columns | None, row_memory: int | None,
           implementation: str | None = None) -> str:
    """Name of the implementation that serves these arguments; the choice is logged once, with the reasons against
    those passed over."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"block sliding attention has no implementation {implementation!r}"
                         f"{did_you_mean(implementation, IMPLEMENTATIONS)}; implementations: "
                         f"{', '.join(IMPLEMENTATIONS)}")
    against = {"splash": _not_splash(q.queries, past, stop_gradient, columns, row_memory),
               "cudnn": _not_cudnn(q.queries, stop_gradient),
               "reference": None if columns is None else "its one chunk has no feedback memory of its own"}
    reasons = []
    for name in (implementation,) if implementation else IMPLEMENTATIONS:
        if against.get(name) is None:
            passed = f" ({'; '.join(reasons)})" if reasons else ""
            _announce(f"block sliding attention runs as {name!r} on {platform()}{passed}")
            return name
        reasons.append(f"not {name!r}: {against[name]}")
    raise ValueError(f"block sliding attention: {'; '.join(reasons)}; pass implementation=None to take the best one "
                     f"that serves")


@functools.cache
def _announce(message: str) -> None:
    log.info(message)


def _not_splash(q: Array, past: Keys, stop_gradient: bool, columns: Columns | None,
                row_memory: int | None) -> str | None:
    if platform() != "tpu":
        return f"it is a TPU kernel and this is {platform()}"
    if past.document.shape[1] or columns is not None or stop_gradient:
        return "it has one static mask: no cache, no feedback memory, no stop_gradient"
    if row_memory is None:
        return "blocks begin where documents do, which a static mask cannot say; cut='row' makes one"
    if axis_size(TIME) > 1:
        return f"the mesh splits the sequence ({TIME}={axis_size(TIME)})"
    if q.shape[1] % splash.TILE:
        return f"{q.shape[1]} tokens are not a multiple of {splash.TILE}"
    return None if q.dtype in (jnp.bfloat16, jnp.float32) else f"it takes bfloat16 and float32, not {q.dtype}"


def _not_cudnn(q: Array, stop_gradient: bool) -> str | None:
    if platform() != "gpu":
        return f"it is an NVIDIA library and this is {platform()}"
    if stop_gradient:
        return "it cannot stop the gradient of some pairs"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"it takes a head_dim that is a multiple of 8 up to 128, not {q.shape[3]}"
    return "of one query, plain products are faster" if q.shape[1] == 1 else None
