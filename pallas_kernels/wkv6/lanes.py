"""Heads side by side along the lanes of a TPU: how the kernels want the arrays, [B, T, H, N] as [B, T, lanes].

Heads of at most 64 go in pairs, each padded to 64; larger ones alone, padded to a multiple of 128. For 64, 128, 256 ...
and an even number of heads, and lengths that are whole blocks, nothing is copied. The state of a group of heads is one
matrix with values along its rows and keys along its columns, block-diagonal: a product with it serves both heads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
LANES = 128


class Lanes(NamedTuple):
    """B, T, H, K, V of the operation; `together` heads a group; key, value: padded sizes; time: padded length."""
    batch: int
    length: int
    heads: int
    keys: int
    values: int
    together: int
    key: int
    value: int
    time: int

    @classmethod
    def of(cls, shape: tuple[int, ...], values: int, tile: int) -> "Lanes":
        """For r of `shape` [B, T, H, K], values of size V and blocks of `tile` positions."""
        batch, length, heads, keys = shape
        up = lambda size, to: -(-size // to) * to
        paired = max(keys, values) <= LANES // 2
        side = LANES // 2 if paired else LANES
        return cls(batch, length, heads, keys, values, 2 if paired else 1, up(keys, side), up(values, side),
                   up(length, tile))

    @property
    def groups(self) -> int:
        return -(-self.heads // self.together)

    def pack(self, x: Array, size: int) -> Array:
        """[B, T, H, N] as [B, time, groups * together * size], zeros in what is added."""
        batch, length, heads, width = x.shape
        more = ((0, 0), (0, self.time - length), (0, self.groups * self.together - heads), (0, size - width))
        return (jnp.pad(x, more) if any(n for _, n in more) else x).reshape(batch, self.time, -1)

    def unpack(self, x: Array, width: int) -> Array:
        """[B, time, lanes] as [B, T, H, width]."""
        x = x.reshape(*x.shape[:2], self.groups * self.together, -1)
        return x[:, :self.length, :self.heads, :width]

    def pack_state(self, state: Array) -> Array:
        """[B, H, K, V] as [B, groups, together * value, together * key]."""
        more = ((0, 0), (0, self.groups * self.together - self.heads), (0, self.key - self.keys),
                (0, self.value - self.values))
        state = jnp.pad(state, more).reshape(-1, self.groups, self.together, self.key, self.value)
        apart = jnp.eye(self.together, dtype=state.dtype)[None, None, :, None, :, None]
        blocks = jnp.swapaxes(state, -1, -2)[:, :, :, :, None, :] * apart
        return blocks.reshape(-1, self.groups, self.together * self.value, self.together * self.key)

    def unpack_state(self, packed: Array) -> Array:
        """[B, groups, together * value, together * key] as [B, H, K, V]."""
        n = self.together
        blocks = packed.reshape(-1, self.groups, n, self.value, n, self.key)
        state = jnp.stack([blocks[:, :, h, :, h] for h in range(n)], axis=2)
        state = jnp.swapaxes(state, -1, -2).reshape(-1, self.groups * n, self.key, self.value)
        return state[:, :self.heads, :self.keys, :self.values]
