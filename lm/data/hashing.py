"""Counter-based randomness: every shuffle and split is a hash, the same on every machine and numpy version.

`numpy.random.Generator.permutation` may change between numpy releases; a run resumed after an upgrade must see the same
batches, so orders are made by sorting hashed counters instead.
"""

import hashlib
import json
from typing import Any

import numpy as np

_MASK = (1 << 64) - 1


def splitmix64(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, the output function of SplitMix64 (Steele, Lea and Flood 2014): a bijection that mixes well."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def fold(*values: int | str) -> int:
    """One 64-bit key from integers and names; the order matters."""
    key = np.zeros(1, np.uint64)
    for value in values:
        number = int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "big") if isinstance(value, str) else value
        key = splitmix64(key ^ np.uint64(number & _MASK))
    return int(key[0])


def permutation(n: int, *key: int | str) -> np.ndarray:
    """[n] int64: a shuffled `arange(n)` that depends on n and the key alone."""
    counters = np.arange(n, dtype=np.uint64) + np.uint64(fold(*key) >> 1)
    return np.argsort(splitmix64(splitmix64(counters)), kind="stable")


def uniform(ids: np.ndarray, *key: int | str) -> np.ndarray:
    """A float64 in [0, 1) for each uint64 id, independent of the other ids."""
    mixed = splitmix64(splitmix64(ids ^ np.uint64(fold(*key))))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def digest(*parts: Any) -> str:
    """16 hexadecimal digits of sha256 over bytes, arrays and JSON-able values."""
    h = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            part = np.ascontiguousarray(part).tobytes()
        elif not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True).encode()
        h.update(len(part).to_bytes(8, "big"))
        h.update(part)
    return h.hexdigest()[:16]
