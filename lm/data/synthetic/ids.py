"""The tokenizer of data that are ids and no text: numbers with spaces between."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from lm.data.hashing import digest


@dataclasses.dataclass(frozen=True)
class Ids:
    """Ids 0 to vocab_size - 1, written as decimal numbers."""

    vocab_size: int

    bos_id = None
    eos_id = None

    def check(self) -> None:
        """Raises ValueError for an empty vocabulary."""
        if self.vocab_size < 1:
            raise ValueError(f"tokenizer ids: vocab_size={self.vocab_size} must be at least 1")

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of each number and the space after it."""
        return np.array([len(str(i)) + 1 for i in range(self.vocab_size)], np.int32)

    @property
    def fingerprint(self) -> str:
        return digest("ids", self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        words = text.split()
        wrong = [word for word in words if not word.isdecimal() or int(word) >= self.vocab_size]
        if wrong:
            raise ValueError(f"tokenizer ids: {wrong[0]!r} is no id; write numbers from 0 to {self.vocab_size - 1} "
                             f"with spaces between")
        return np.array([int(word) for word in words], np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return "".join(f"{int(i)} " for i in ids)
