"""The published goldfish hash, bit for bit: product of the window's ids modulo a prime, and a table of random numbers.

As in `apply_goldfish` (strategy hash-table) of the authors' training code, on a CPU. Its weaknesses are kept: an id 0
makes every window that holds it equal, an id 1 is not seen, and neither is the order.

int64 arithmetic is done in two uint32, high and low, so that JAX needs no flag. Arrays are numpy's or JAX's, [B, T].
"""

import functools
from typing import Any

import numpy as np

TABLE_SIZE = 1_000_003  # a prime
SEED = 2971215073  # the 47th Fibonacci number, a prime
_OF_2_64 = 2**64 % TABLE_SIZE

Word = tuple[Any, Any]


@functools.cache
def table() -> np.ndarray:
    """[TABLE_SIZE] int64, numbers below 2^24: the table is these times 2^-24.

    torch's CPU generator is the Mersenne Twister; `torch.rand` in float32 keeps the low 24 bits of each draw.
    """
    draws = np.random.RandomState(SEED).randint(0, 2**32, TABLE_SIZE, dtype=np.uint32)
    return (draws & np.uint32(0xFFFFFF)).astype(np.int64)


@functools.lru_cache(maxsize=16)
def drop_table(k: int) -> np.ndarray:
    """[TABLE_SIZE] bool: the entry is below 1/k."""
    return table() * k < 2**24


def multiply(a: Word, b: Word) -> Word:
    """a * b modulo 2^64."""
    half, low = np.uint32(16), np.uint32(0xFFFF)
    (a_high, a_low), (b_high, b_low) = a, b
    a0, a1, b0, b1 = a_low & low, a_low >> half, b_low & low, b_low >> half
    cross, other = a0 * b1, a1 * b0
    middle = (a0 * b0 >> half) + (cross & low) + (other & low)
    carried = a1 * b1 + (cross >> half) + (other >> half) + (middle >> half)
    return carried + a_low * b_high + a_high * b_low, a_low * b_low


def shift_ones(x: Word, n: int) -> Word:
    """The words moved right by n positions, ones in front."""
    xp = x[0].__array_namespace__()
    size = x[0].shape[1]
    if n >= size:
        return xp.zeros_like(x[0]), xp.ones_like(x[1])
    front = x[0][:, :n]
    return (xp.concatenate([xp.zeros_like(front), x[0][:, :-n]], axis=1),
            xp.concatenate([xp.ones_like(front), x[1][:, :-n]], axis=1))


def window_product(ids: Any, width: int) -> Word:
    """Product of the last `width` ids up to each position, modulo 2^64."""
    one = ids.astype(np.uint32)
    xp = one.__array_namespace__()
    one = (xp.zeros_like(one), one)
    out, n = one, 1
    for bit in bin(width)[3:]:
        out, n = multiply(out, shift_ones(out, n)), 2 * n
        if bit == "1":
            out, n = multiply(one, shift_ones(out, 1)), n + 1
    return out


def modulo(x: Word) -> Any:
    """The word, read as int64, modulo TABLE_SIZE, never negative; uint32."""
    prime = np.uint32(TABLE_SIZE)
    out = x[0] % prime
    for bits, down in ((12, 20), (12, 8), (8, 0)):  # a remainder is below 2^20: twelve more bits fit
        piece = x[1] >> np.uint32(down) & np.uint32(2**bits - 1)
        out = (out << np.uint32(bits) | piece) % prime
    negative = x[0] >> np.uint32(31)
    return (out + negative * np.uint32(TABLE_SIZE - _OF_2_64)) % prime


def product_keys(tokens: Any, targets: Any, h: int) -> Any:
    """[B, T] uint32: entry of the table for the h targets up to each; those before it are the inputs since."""
    word = targets.astype(np.uint32)
    xp = word.__array_namespace__()
    word = (xp.zeros_like(word), word)
    return modulo(multiply(word, window_product(tokens, h - 1)) if h > 1 else word)
