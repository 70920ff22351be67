"""Word problem of a finite group: after each element, the product of all so far (Merrill et al. 2024, section 4).

Legend: n rows, T seq_len.
"""

import dataclasses
import functools
import itertools

import numpy as np

from lm.core.fields import did_you_mean, option
from lm.data.synthetic.base import Draw, Rows


def _even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


# Name to (points that are permuted, which permutations belong to it).
GROUPS = {"Z2": (2, lambda p: True), "S3": (3, lambda p: True), "A5": (5, _even), "S5": (5, lambda p: True)}


@functools.cache
def multiplication(group: str) -> np.ndarray:
    """[G, G] int: table[a, b] is the number of the permutation that does a first, then b; 0 is the identity."""
    points, belongs = GROUPS[group]
    elements = [p for p in itertools.permutations(range(points)) if belongs(p)]
    number = {p: i for i, p in enumerate(elements)}
    return np.array([[number[tuple(b[i] for i in a)] for b in elements] for a in elements])


@dataclasses.dataclass(frozen=True)
class WordProblem:
    """Random elements of a group; the target of each is the product up to and with it. Weight is on every position.

    Following it is tracking a state: S3 and S5 are not commutative, so that no count of the elements answers it.
    """

    group: str = option("S3", f"the group: {', '.join(GROUPS)}")
    length: int | None = option(None, "elements of a word; a row holds as many words as fit. None is the row")
    report: tuple[int, ...] = option((), "lengths n whose accuracy is evaluated as set length_<n>: over the last "
                                         "eighth of the first n elements")

    def check(self) -> None:
        """Raises ValueError for an unknown group, and lengths that are none."""
        if self.group not in GROUPS:
            raise ValueError(f"word_problem has no group {self.group!r}{did_you_mean(self.group, GROUPS) or '.'} "
                             f"It takes: {', '.join(GROUPS)}")
        if self.length is not None and self.length < 1:
            raise ValueError(f"word_problem: length={self.length} must be at least 1, or None for the whole row")
        if any(n < 1 or (self.length is not None and n > self.length) for n in self.report):
            raise ValueError(f"word_problem: report={self.report} must be lengths from 1 to "
                             f"{self.length or 'train.seq_len'}")

    @property
    def vocab_size(self) -> int:
        return len(multiplication(self.group))

    def check_length(self, seq_len: int) -> None:
        """Raises ValueError where a word is longer than a row."""
        longest = max((self.length or 1, *self.report))
        if seq_len < longest:
            raise ValueError(f"word_problem with length={self.length}, report={self.report} needs train.seq_len of at "
                             f"least {longest}; got {seq_len}")

    def rows(self, draw: Draw, seq_len: int) -> Rows:
        """Words one after the other, and padding where no more fits."""
        length = self.length or seq_len
        table = multiplication(self.group)
        tokens = draw.integers("elements", seq_len, len(table))
        present = np.arange(seq_len) < seq_len // length * length
        tokens = np.where(present, tokens, 0)
        positions = np.broadcast_to(np.where(present, np.arange(seq_len) % length, -1), tokens.shape)
        targets, product = np.zeros_like(tokens), np.zeros(len(tokens), np.int64)
        for t in range(seq_len):
            product = tokens[:, t] if t % length == 0 else table[product, tokens[:, t]]
            targets[:, t] = product
        return Rows(tokens, targets, np.broadcast_to(present, tokens.shape), positions)

    def slices(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """`length_<n>` of each n in `report`."""
        return {f"length_{n}": (positions >= n - max(1, n // 8)) & (positions < n) for n in self.report}
