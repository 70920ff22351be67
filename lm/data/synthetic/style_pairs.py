"""Pairs of responses with the same content in different styles: what learning from preferences can be measured by.

Legend: n rows, T seq_len, k contents of a prompt.
"""

import dataclasses

import numpy as np

from lm.core.fields import option
from lm.data.synthetic.base import Draw, Rows

NEUTRAL, GOOD, BAD, END, FIRST_CONTENT = range(5)
CHOSEN, REJECTED, MISMATCHED = 1, 2, 3  # document numbers, see docs/preferences.md


@dataclasses.dataclass(frozen=True)
class StylePairs:
    """A prompt c1 . c2 . ... ck . and two responses that repeat it with a mark behind each content: good ones stand
    there with probability `purity` in the chosen response, bad ones in the rejected one.

    Ids: 0 neutral, 1 good, 2 bad, 3 end, then the contents. A response may end after any content but the first: with
    probability `stop` after each in the chosen, `rejected_stop` in the rejected one. One pair a row.
    """

    num_contents: int = option(8, "k, contents of a prompt")
    num_symbols: int = option(200, "different contents")
    purity: float = option(0.8, "probability of the style that fits the response")
    stop: float = option(0.0, "probability of ending after a content, chosen response")
    rejected_stop: float = option(0.0, "the same of the rejected response")
    mismatched: bool = option(False, "a third document: the chosen response behind another prompt, for KTO")

    pairs = True  # rows hold pairs, not text

    def check(self) -> None:
        """Raises ValueError for sizes below 1 and shares that are none."""
        if self.num_contents < 2 or self.num_symbols < 1:
            raise ValueError(f"style_pairs: num_contents={self.num_contents} must be at least 2 and num_symbols="
                             f"{self.num_symbols} at least 1")
        if not all(0 <= share <= 1 for share in (self.purity, self.stop, self.rejected_stop)):
            raise ValueError("style_pairs: purity, stop and rejected_stop must be from 0 to 1")

    @property
    def vocab_size(self) -> int:
        return FIRST_CONTENT + self.num_symbols

    @property
    def document(self) -> int:
        """Inputs of one prompt with its longest response and the end."""
        return 4 * self.num_contents

    def check_length(self, seq_len: int) -> None:
        """Raises ValueError where a row cannot hold its documents."""
        needed = self.document * (3 if self.mismatched else 2)
        if seq_len < needed:
            raise ValueError(f"style_pairs with num_contents={self.num_contents}, mismatched={self.mismatched} needs "
                             f"train.seq_len of at least {needed}; got {seq_len}")

    def _response(self, draw: Draw, name: str, contents: np.ndarray, good: float, stop: float
                  ) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n, 2 k + 1], length [n]): content and mark in turn, then the end."""
        n, k = contents.shape
        ids = np.empty((n, 2 * k + 1), np.int64)
        ids[:, 0:-1:2] = contents
        ids[:, 1::2] = np.where(draw.uniform(f"style {name}", k) < good, GOOD, BAD)
        stops = draw.uniform(f"stop {name}", k) < stop
        stops[:, 0], stops[:, -1] = False, True
        count = stops.argmax(axis=1) + 1
        ids[np.arange(n), 2 * count] = END
        return ids, 2 * count + 1

    def rows(self, draw: Draw, seq_len: int) -> Rows:
        """The chosen document, the rejected one and, where asked for, that with another prompt."""
        k = self.num_contents
        contents = FIRST_CONTENT + draw.integers("contents", k, self.num_symbols)
        other = FIRST_CONTENT + draw.integers("other contents", k, self.num_symbols)
        chosen = self._response(draw, "chosen", contents, self.purity, self.stop)
        documents = [(CHOSEN, contents, chosen),
                     (REJECTED, contents, self._response(draw, "rejected", contents, 1 - self.purity,
                                                         self.rejected_stop))]
        if self.mismatched:
            documents.append((MISMATCHED, other, chosen))
        n = len(contents)
        tokens, targets, segments = (np.zeros((n, seq_len), np.int64) for _ in range(3))
        answers, positions = np.zeros((n, seq_len), bool), np.full((n, seq_len), -1)
        at = np.zeros(n, np.int64)
        for number, prompt, (response, length) in documents:
            stream = np.full((n, 4 * k + 1), NEUTRAL)
            stream[:, 0:2 * k:2], stream[:, 2 * k:] = prompt, response
            inputs = 2 * k + length - 1
            place = np.arange(4 * k)
            row, column = np.nonzero(place < inputs[:, None])
            there = at[row] + column
            tokens[row, there], targets[row, there] = stream[row, column], stream[row, column + 1]
            segments[row, there], positions[row, there] = number, column
            answers[row, there] = column >= 2 * k - 1
            at += inputs
        return Rows(tokens, targets, answers, positions, segments)

    def slices(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """None."""
        return {}
