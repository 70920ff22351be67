"""Pass key retrieval: a key in the first block of a text, filler, and a question at the end (Mohtashami and Jaggi 2023,
in the blocks of Hwang et al. 2024).

Legend: n rows, T seq_len.
"""

import dataclasses

import numpy as np

from lm.core.fields import option
from lm.data.synthetic.base import Draw, Rows, one_example

QUESTION, FIRST_KEY = 0, 1


@dataclasses.dataclass(frozen=True)
class Passkey:
    """One key at a random place of the first block, random filler, and as the last token the question for the key.

    A row is one text of a number of blocks drawn from `blocks`, then padding. Id 0 is the question, then come the keys,
    then the filler. Weight is on the question alone; each number of blocks is also evaluated as set blocks_<n>.
    """

    blocks: tuple[int, ...] = option((2, 3, 4, 6), "numbers of blocks that a text may have, each as often")
    block: int = option(16, "tokens of a block")
    num_keys: int = option(16, "different keys")
    num_filler: int = option(16, "different tokens of filler")

    def check(self) -> None:
        """Raises ValueError for sizes that leave no row."""
        if not self.blocks or min(self.blocks) < 1 or len(set(self.blocks)) < len(self.blocks):
            raise ValueError(f"passkey: blocks={self.blocks} must be distinct numbers of at least 1")
        if self.block < 2 or self.num_keys < 1 or self.num_filler < 1:
            raise ValueError(f"passkey: block={self.block} must be at least 2, num_keys={self.num_keys} and num_filler="
                             f"{self.num_filler} at least 1")

    @property
    def vocab_size(self) -> int:
        return FIRST_KEY + self.num_keys + self.num_filler

    def check_length(self, seq_len: int) -> None:
        """Raises ValueError where the longest text does not fit."""
        if seq_len < max(self.blocks) * self.block:
            raise ValueError(f"passkey with blocks={self.blocks} of {self.block} needs train.seq_len (or eval.seq_len) "
                             f"of at least {max(self.blocks) * self.block}; got {seq_len}")

    def rows(self, draw: Draw, seq_len: int) -> Rows:
        """One text a row."""
        count = np.asarray(self.blocks)[draw.integers("blocks", 1, len(self.blocks))]
        length = count * self.block
        key = FIRST_KEY + draw.integers("key", 1, self.num_keys)
        # In a text of one block the question stands in it too.
        place = draw.integers("place", 1, self.block - 1)
        index = np.broadcast_to(np.arange(seq_len), (len(key), seq_len))
        tokens = FIRST_KEY + self.num_keys + draw.integers("filler", seq_len, self.num_filler)
        tokens = np.where(index == place, key, tokens)
        question = index == length - 1
        tokens = np.where(question, QUESTION, np.where(index < length, tokens, 0))
        made = one_example(tokens, np.where(question, key, 0), question)
        return made._replace(positions=np.where(index < length, index, -1))

    def slices(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """`blocks_<n>` of each number in `blocks`."""
        count = (positions.max(axis=1, keepdims=True) + 1) // self.block
        return {f"blocks_{n}": np.broadcast_to(count == n, positions.shape) for n in self.blocks}

    def of_slice(self, name: str) -> "Passkey":
        """The task whose rows are all of this slice."""
        return dataclasses.replace(self, blocks=(int(name.removeprefix("blocks_")),))
