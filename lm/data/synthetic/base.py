"""What a synthetic task is: a frozen dataclass that makes the rows of given numbers.

Legend: n rows, T seq_len.
"""

from typing import NamedTuple, Protocol

import numpy as np

from lm.data.hashing import uniform


class Rows(NamedTuple):
    """tokens, targets: [n, T] int. answers: [n, T] bool, where a target counts. positions: [n, T] int, place in the
    row's example, 0 where one starts; -1 is padding, which stands only at the end of a row. segments: [n, T] int,
    numbers of the documents where they mean something (pairs), and then every target is kept; None counts from 1."""

    tokens: np.ndarray
    targets: np.ndarray
    answers: np.ndarray
    positions: np.ndarray
    segments: np.ndarray | None = None


class Task(Protocol):
    """vocab_size: ids are below it."""

    vocab_size: int

    def check_length(self, seq_len: int) -> None:
        """Raises ValueError where a row of seq_len cannot hold an example."""

    def rows(self, draw: "Draw", seq_len: int) -> Rows:
        """The rows that `draw` numbers, a pure function of them."""

    def slices(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Name to mask [n, T] of answers that are also evaluated by themselves."""


class Draw:
    """Random numbers of n rows, by hashing: the same on every machine and numpy version. key: of the split and seed.
    row_numbers: [n]."""

    def __init__(self, key: int, row_numbers: np.ndarray) -> None:
        self._key, self._rows = key, np.asarray(row_numbers, np.uint64)

    def uniform(self, name: str, count: int) -> np.ndarray:
        """[n, count] float64 in [0, 1), independent of what is drawn under other names."""
        counters = (self._rows[:, None] << np.uint64(24)) + np.arange(count, dtype=np.uint64)
        return uniform(counters, self._key, name)

    def integers(self, name: str, count: int, below: int) -> np.ndarray:
        """[n, count] int64 from 0 to below - 1."""
        return (self.uniform(name, count) * below).astype(np.int64)

    def distinct(self, name: str, count: int, below: int) -> np.ndarray:
        """[n, count] int64 from 0 to below - 1, in random order, no number twice in a row."""
        return np.argsort(self.uniform(name, below), axis=1, kind="stable")[:, :count]


def one_example(tokens: np.ndarray, targets: np.ndarray, answers: np.ndarray) -> Rows:
    """Rows that are one example each."""
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return Rows(tokens, targets, answers, positions)
