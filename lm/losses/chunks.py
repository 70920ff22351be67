"""What is said of every position's logits, without holding the logits of all of them.

Shape legend: B batch, T time, D embed_dim, V padded vocabulary, R devices along the rows, S along the time, N chunks of
C positions of each.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.axes import BATCH_AXES
from lm.core.head import logits_of
from lm.core.sharding import axis_size, constrain, current_mesh, platform
from lm.core.types import Array, Head

# Logits that a device holds at a time where those of all positions are too many, by platform: 16 MB in float32, which
# stay in a CPU's caches. Elsewhere 256 MB: a chunk reads the whole head, and one of few positions waits for that.
CHUNK_ELEMENTS = {"cpu": 1 << 22, "tpu": 1 << 26, "gpu": 1 << 26}
# The most that a step on a CPU holds from the forward to the backward pass: 1 GiB in float32, over all its devices.
HELD_ELEMENTS = 1 << 28

Score = Callable[[Array, Any], Any]


def over_chunks(score: Score, hidden: Array, head: Head, beside: Any, *, chunk: int | None = None) -> Any:
    """`score(logits, beside)` of all positions: at once, or a chunk of them at a time, made again in the backward pass.

    beside: tree of arrays [B, T, ...], what each position needs besides its logits. score: of logits [..., V], gives a
    tree of arrays [..., ...]. chunk: positions of T at a time and device; all of T keeps all logits for the backward
    pass, which saves it a quarter of the head's products. None is all of T on a CPU where that is at most HELD_ELEMENTS
    logits, else the most of which there are at most CHUNK_ELEMENTS a device.
    """
    B, T, _ = hidden.shape
    V = head.kernel.shape[0]
    rows = axis_size(*BATCH_AXES) if B % axis_size(*BATCH_AXES) == 0 else 1
    times = axis_size("context") if T % axis_size("context") == 0 else 1
    local = T // times  # positions that one device holds of a row
    if chunk is None:
        held = B * T * V <= HELD_ELEMENTS and platform() == "cpu"
        a_position = B // rows * math.ceil(V / axis_size("tensor"))
        chunk = local if held else max(1, CHUNK_ELEMENTS[platform()] // a_position)
    if chunk >= local:
        return _at_once(score, hidden, head, beside)
    count = math.ceil(local / chunk)
    chunk = math.ceil(local / count)

    def cut(a):
        """[B, T, ...] to [N, R, S, B / R, C, ...]: every device cuts its own rows and its own stretch of time."""
        a = a.reshape(rows, B // rows, times, local, *a.shape[2:])
        a = jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, count * chunk - local)) + ((0, 0),) * (a.ndim - 4))
        return jnp.moveaxis(a.reshape(*a.shape[:3], count, chunk, *a.shape[4:]), (3, 2), (0, 2))

    def join(a):
        a = jnp.moveaxis(a, (0, 2), (3, 2))
        a = a.reshape(rows, B // rows, times, count * chunk, *a.shape[5:])[:, :, :, :local]
        return a.reshape(B, T, *a.shape[4:])

    if current_mesh() is None:
        one = lambda hidden, beside: jax.tree.map(
            lambda a: a[None, None], _at_once(score, hidden[0, 0], head, jax.tree.map(lambda a: a[0, 0], beside)))
    else:
        # In the loop every device multiplies by a copy of the head of its own and sums the gradient of its copy: what
        # devices tell each other of the head, they tell once, before the loop and after it.
        copy = lambda a, *axes: constrain(jnp.broadcast_to(a, (rows, times, *a.shape)), "batch", "length", *axes)
        kernel = copy(head.kernel, "vocab", None)
        bias = None if head.bias is None else copy(head.bias, "vocab")
        by_device = jax.vmap(jax.vmap(lambda h, k, b: logits_of(h, head._replace(kernel=k, bias=b))))
        one = lambda hidden, beside: score(
            constrain(by_device(hidden, kernel, bias), "batch", "length", None, None, "vocab"), beside)

    # The map closes over the head, so its gradient is summed over chunks in one buffer.
    remade = jax.checkpoint(lambda part: one(*part))
    return jax.tree.map(join, jax.lax.map(remade, (cut(hidden), jax.tree.map(cut, beside))))


def _at_once(score: Score, hidden: Array, head: Head, beside: Any) -> Any:
    if current_mesh() is not None:
        return score(constrain(logits_of(hidden, head), "batch", "length", "vocab"), beside)
    # In two dimensions, as the product gives them: XLA's CPU backend then writes their gradient over the logits.
    rows, length = hidden.shape[:2]
    flat = lambda a: a.reshape(rows * length, *a.shape[2:])
    found = score(logits_of(flat(hidden), head), jax.tree.map(flat, beside))
    return jax.tree.map(lambda a: a.reshape(rows, length, *a.shape[1:]), found)
