"""`wkv6` where time is split over devices. B batch, T time of one device, H heads, K key size, V value size."""

import jax
import jax.numpy as jnp

from pallas_kernels.sequence import affine, exchange
from pallas_kernels.wkv6.api import wkv6

Array = jax.Array


def wkv6_over_sequence(r: Array, w: Array, k: Array, v: Array, u: Array, state: Array | None = None,
                       reset: Array | None = None, *, axis_name: str,
                       implementation: str | tuple[str, ...] | None = None) -> tuple[Array, Array]:
    """`wkv6` inside `jax.shard_map`, T cut along mesh axis `axis_name` in order, u and state the same on its devices.

    y is this device's part; the state returned is the one after all of time, the same on all devices.
    """
    wide = jnp.promote_types(r.dtype, jnp.float32)
    if state is None:
        state = jnp.zeros((*r.shape[:1], *r.shape[2:], v.shape[-1]), wide)
    faded = jnp.broadcast_to(w, r.shape).astype(wide)
    # Log decay from each position to the end: a sum of what is no larger than 0, added up from the end, so that weak
    # decays after a strong one keep their digits.
    until_end = jnp.cumsum(faded[:, ::-1], axis=1)[:, ::-1]
    total = jnp.exp(until_end[:, 0])
    after = jnp.exp(jnp.pad(until_end[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0))))
    if reset is not None:
        starts = jnp.cumsum(reset[:, ::-1], axis=1)[:, ::-1]            # documents that start here or later
        alive = jnp.pad(starts[:, 1:], ((0, 0), (0, 1))) == 0
        after, total = jnp.where(alive[..., None, None], after, 0), jnp.where(starts[:, :1, None] == 0, total, 0)
    written = jnp.einsum("bthk,bthv->bhkv", k.astype(wide) * after, v.astype(wide), precision="highest")
    initial = jnp.ones_like(total)[..., None], state.astype(wide)
    before, last = exchange((total[..., None], written), initial, affine, axis_name)
    return wkv6(r, w, k, v, u, before[1], reset, implementation=implementation)[0], last[1]
