"""A few documents that come again and again among new ones of the same kind: what does a model know by heart?

Legend: n rows, T seq_len, L length of a document.
"""

import dataclasses
import functools

import numpy as np

from lm.core.fields import option
from lm.data.hashing import fold, uniform
from lm.data.synthetic.base import Draw, Rows

MEMBERS, CONTROLS = "members", "controls"


@dataclasses.dataclass(frozen=True)
class Recital:
    """Documents of a Markov chain: the next id is one of the few successors of the last, all equally probable.

    A document of a row is, with probability `share`, one of `num_documents` fixed ones (the members), and new
    otherwise. Chain, members and as many controls, which no row holds, are the task's: validation on share=0 is new
    text of the same chain. Its loss cannot fall below log(successors) in the mean, but by heart.
    """

    num_documents: int = option(32, "documents that come again and again; and as many controls, which never come")
    length: int = option(48, "ids of a document; a row holds as many documents as fit")
    num_symbols: int = option(64, "different ids")
    successors: int = option(8, "ids that may follow an id")
    share: float = option(0.5, "share of the documents of rows that are members; 0 makes new text only")
    draw: int = option(0, "number of the chain and of the fixed documents")

    def check(self) -> None:
        """Raises ValueError for sizes that make no document."""
        if self.num_documents < 1 or self.length < 2:
            raise ValueError(f"recital: num_documents={self.num_documents} must be at least 1, and length="
                             f"{self.length} at least 2")
        if not 1 <= self.successors <= self.num_symbols:
            raise ValueError(f"recital: successors={self.successors} must be from 1 to num_symbols={self.num_symbols}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"recital: share={self.share} must be from 0 to 1")

    @property
    def vocab_size(self) -> int:
        return self.num_symbols

    def check_length(self, seq_len: int) -> None:
        """Raises ValueError where no document fits."""
        if seq_len < self.length:
            raise ValueError(f"recital with length={self.length} needs train.seq_len of at least that; got {seq_len}")

    def chain(self) -> np.ndarray:
        """[num_symbols, successors]: what may follow each id."""
        draw = Draw(fold(self.draw, "recital", "chain"), np.arange(self.num_symbols))
        return draw.distinct("successors", self.successors, self.num_symbols)

    def walk(self, steps: np.ndarray) -> np.ndarray:
        """Documents [..., L] of uniform numbers [..., L]."""
        chain, out = self.chain(), np.empty(steps.shape, np.int64)
        out[..., 0] = steps[..., 0] * self.num_symbols
        for t in range(1, self.length):
            out[..., t] = chain[out[..., t - 1], (steps[..., t] * self.successors).astype(np.int64)]
        return out

    def documents(self, which: str) -> np.ndarray:
        """[num_documents, L]: the members, or the controls."""
        count = self.num_documents * self.length
        steps = uniform(np.arange(count, dtype=np.uint64), self.draw, "recital", which)
        return self.walk(steps.reshape(self.num_documents, self.length))

    @functools.cached_property
    def members(self) -> np.ndarray:
        """[num_documents, L]."""
        return self.documents(MEMBERS)

    def rows(self, draw: Draw, seq_len: int) -> Rows:
        """seq_len // L documents, and padding."""
        L, count = self.length, seq_len // self.length
        fresh = self.walk(draw.uniform("fresh", count * L).reshape(-1, count, L))
        which = draw.integers("which", count, self.num_documents)
        again = draw.uniform("again", count) < self.share
        text = np.where(again[..., None], self.members[which], fresh).reshape(-1, count * L)
        tokens = np.pad(text, ((0, 0), (0, seq_len - count * L)))
        present = np.arange(seq_len) < count * L
        positions = np.where(present, np.arange(seq_len) % L, -1)
        answers = present & (positions < L - 1)
        targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        return Rows(tokens, targets, np.broadcast_to(answers, tokens.shape), np.broadcast_to(positions, tokens.shape))

    def slices(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """None."""
        return {}
