"""The hash behind goldfish masks, version 1: order-sensitive, 64 bits in two lanes of uint32, a pure function of ids.

Each id is mixed with the salt, differently in each lane; a window is the polynomial sum of its mixed ids in each lane;
both lanes are mixed into 32 bits, which a threshold is compared with. There is no table and no 64-bit arithmetic, which
JAX has only behind a flag. Any change of what comes out for some window needs another VERSION: texts would lose other
targets than before.

Arrays are numpy's or JAX's, [B, T]; arithmetic is modulo 2^32.
"""

import functools
from typing import Any

import numpy as np

VERSION = 1
MULTIPLIERS = (0x2C1B3C6D, 0x85EBCA6B)  # odd and not 1 or 7 modulo 8: their powers repeat after 2^30
GOLDEN = 0x9E3779B97F4A7C15
_MASK32, _MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF

Lanes = tuple[int, int]


def mix(x: Any) -> Any:
    """A bijection of uint32 in which every bit depends on every other (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


@functools.cache
def lanes_of_salt(salt: int) -> Lanes:
    """Two 32-bit numbers from the salt and the version (one step of SplitMix64)."""
    z = ((salt << 8) + VERSION) * GOLDEN & _MASK64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK64
    z ^= z >> 31
    return z >> 32, z & _MASK32


def threshold(k: int) -> np.uint32:
    """32 random bits are below it with probability 1/k, to 2^-32."""
    return np.uint32(2**32 // k)


def shift(x: Any, n: int) -> Any:
    """`x` [B, T] moved right by n positions, zeros in front."""
    if n == 0:
        return x
    xp = x.__array_namespace__()
    if n >= x.shape[1]:
        return xp.zeros_like(x)
    return xp.concatenate([xp.zeros_like(x[:, :n]), x[:, :-n]], axis=1)


def coded(ids: Any, salt: Lanes) -> tuple[Any, Any]:
    """The two lanes of each id."""
    ids = ids.astype(np.uint32)
    return mix(ids ^ np.uint32(salt[0])), mix(ids * np.uint32(GOLDEN >> 32 | 1) + np.uint32(salt[1]))


def window_sum(codes: Any, width: int, multiplier: int) -> Any:
    """[B, T]: sum over i below width of multiplier^i * codes[t - i], in 2 log2(width) steps at most."""
    out, n = codes, 1
    for bit in bin(width)[3:]:
        out, n = out + np.uint32(pow(multiplier, n, 2**32)) * shift(out, n), 2 * n
        if bit == "1":
            out, n = codes + np.uint32(multiplier) * shift(out, 1), n + 1
    return out


def window_bits(tokens: Any, targets: Any, h: int, salt: Lanes) -> Any:
    """[B, T] uint32: hash of the h tokens that end with each target, the h - 1 before it being inputs.

    Only inputs are looked at for what is before the target: other targets may be undefined. The result is meaningless
    where the window begins before the row.
    """
    lanes = []
    for context, target, multiplier in zip(coded(tokens, salt), coded(targets, salt), MULTIPLIERS, strict=True):
        before = np.uint32(multiplier) * window_sum(context, h - 1, multiplier) if h > 1 else np.uint32(0)
        lanes.append(target + before)
    return mix(lanes[0] ^ mix(lanes[1] + np.uint32(h)))


def random_bits(rows: Any, places: Any, salt: Lanes) -> Any:
    """[B, T] uint32 of row numbers [B, 1] and places [1, T], different for every pair."""
    row = mix(mix(rows ^ np.uint32(salt[0])) + np.uint32(salt[1]))
    return mix(row ^ mix(places * np.uint32(MULTIPLIERS[0]) + np.uint32(salt[1])))
