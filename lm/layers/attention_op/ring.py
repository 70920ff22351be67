"""Ring attention: aligned attention over a sequence that the mesh axis `context` splits.

Shard r holds rows [r L, (r + 1) L). Keys, values and documents travel around the ring; at hop s a shard meets the keys
of the shard s places before it, whose distance to its own rows is the static s L, so every hop is blocked attention
with that offset, and two hops merge by their log-sum-exp (Liu et al. 2023, Ring Attention). Hops beyond the window are
not made.

Shape legend: B batch, T queries, H heads, G key-value heads, K head_dim, L rows of a shard.
"""

import functools

import jax
import jax.numpy as jnp

from lm.core.sharding import current_mesh
from lm.layers.attention_op import blocked
from lm.layers.attention_op.sharded import compiler_splits, over_shards
from lm.layers.attention_op.visibility import EMPTY, Visibility

Array = jax.Array
AXIS = "context"


def attend(q: Array, k: Array, v: Array, see: Visibility, *, scale: float) -> Array:
    """Aligned attention, T split over `context`. q [B, T, H, K], k and v [B, T, G, K] -> [B, T, H, K]. T divisible."""
    local = functools.partial(_local, size=current_mesh().shape[AXIS], window=see.window, scale=scale)
    return over_shards(local, q, k, v, (see.q_documents, see.k_documents), length="length")


def _local(q, k, v, documents, *, size, window, scale):
    q_documents, k_documents = documents
    rows = q.shape[1]

    def hop(distance, k, v, k_documents):
        see = Visibility(True, distance * rows, window, None, None, q_documents, k_documents)
        out, logsumexp = blocked.attend_with_logsumexp(q, k, v, see, scale=scale)
        return out.astype(logsumexp.dtype), logsumexp

    def nothing(k, v, k_documents):
        wide = jnp.promote_types(q.dtype, jnp.float32)
        return jnp.zeros(q.shape, wide), jnp.full((q.shape[0], q.shape[2], rows), EMPTY / 2, wide)

    out, logsumexp = hop(0, k, v, k_documents)
    me = jax.lax.axis_index(AXIS)
    ring = [(shard, (shard + 1) % size) for shard in range(size)]
    for distance in range(1, size):
        if window is not None and (distance - 1) * rows + 1 >= window:
            break
        k, v, k_documents = jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, ring), (k, v, k_documents))
        # Shards before `distance` have met keys of later rows (the ring wraps around): they see none of them.
        new = jax.lax.cond(me >= distance, functools.partial(hop, distance), nothing, k, v, k_documents)
        out, logsumexp = merge((out, logsumexp), new)
    return out.astype(q.dtype)


def merge(one: tuple[Array, Array], two: tuple[Array, Array]) -> tuple[Array, Array]:
    """Attention over the union of two disjoint sets of keys, from each one's (out [B, T, H, K], log-sum-exp)."""
    (out_one, sum_one), (out_two, sum_two) = one, two
    both = jnp.logaddexp(sum_one, sum_two)
    part_one, part_two = (jnp.exp(s - both).swapaxes(1, 2)[..., None] for s in (sum_one, sum_two))
    return out_one * part_one + out_two * part_two, both


def unsupported(see: Visibility, q: Array, k: Array) -> str | None:
    """Why the ring cannot serve these arguments, or None."""
    mesh = current_mesh()
    if mesh is None or mesh.shape.get(AXIS, 1) == 1 or not compiler_splits():
        return "the current mesh does not split the sequence (context is 1)"
    if not see.aligned:
        return "keys are not aligned with queries (a cache)"
    if q.shape[1] % mesh.shape[AXIS]:
        return f"{q.shape[1]} tokens are not divisible by context={mesh.shape[AXIS]}"
    return None
