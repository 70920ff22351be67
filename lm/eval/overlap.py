"""How much of one sequence stands in another: longest common subsequence, ROUGE-L, longest common substring."""

import re
from collections.abc import Hashable, Sequence

import numpy as np


def _numbers(a: Sequence[Hashable], b: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Both as ints that are equal where the items are."""
    known: dict[Hashable, int] = {}
    return tuple(np.array([known.setdefault(item, len(known)) for item in items], np.int64) for items in (a, b))


def common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest sequence whose items stand in both in the same order, not necessarily side by side."""
    x, y = _numbers(a, b)
    row = np.zeros(len(y) + 1, np.int64)
    for item in x:
        # An entry is the entry before it diagonally and one more where items match, or the larger of its neighbours.
        row = np.maximum.accumulate(np.maximum(row, np.concatenate([[0], np.where(y == item, row[:-1] + 1, 0)])))
    return int(row[-1])


def common_substring(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest run of items that stands in both."""
    x, y = _numbers(a, b)
    row, best = np.zeros(len(y) + 1, np.int64), 0
    for item in x:
        row = np.concatenate([[0], np.where(y == item, row[:-1] + 1, 0)])
        best = max(best, int(row.max()))
    return best


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case: what ROUGE counts."""
    return re.findall(r"[^\W_]+", text.lower())


def rouge_l(found: str, wanted: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, with equal weight on precision and recall): 1 where the
    words are equal, 0 where they share none or a text has none. It is 1 for two texts without words that are equal."""
    a, b = words(found), words(wanted)
    if not a or not b:
        return float(found == wanted)
    return 2 * common_subsequence(a, b) / (len(a) + len(b))
