"""Multi-query associative recall (Arora et al. 2023, "Zoology", section 3): how many pairs does a state hold?

Legend: n rows, P pairs, T seq_len.
"""

import dataclasses

import numpy as np

from lm.core.fields import option
from lm.data.synthetic.base import Draw, Rows, one_example

FILLER, FIRST_KEY = 0, 1


@dataclasses.dataclass(frozen=True)
class MQAR:
    """P pairs of key and value; later each key comes once more, in random order at random places, and asks for its
    value, which follows it. Between them is filler (id 0). Weight is on the second coming of each key.

    Keys of a row are distinct; values are drawn independently. The places of the questions are uniform, where the paper
    draws their distance by a power law.
    """

    num_pairs: int = option(8, "pairs of a row")
    num_keys: int = option(64, "different keys; ids 1 to num_keys")
    num_values: int = option(64, "different values; the ids after the keys")

    def check(self) -> None:
        """Raises ValueError for sizes that leave no row."""
        if self.num_pairs < 1 or self.num_values < 1:
            raise ValueError(f"mqar: num_pairs={self.num_pairs} and num_values={self.num_values} must be at least 1")
        if self.num_keys < self.num_pairs:
            raise ValueError(f"mqar: the keys of a row are distinct, and num_keys={self.num_keys} is less than "
                             f"num_pairs={self.num_pairs}; give more keys or fewer pairs")

    @property
    def vocab_size(self) -> int:
        return FIRST_KEY + self.num_keys + self.num_values

    def check_length(self, seq_len: int) -> None:
        """Raises ValueError where pairs and questions do not fit."""
        if seq_len < 4 * self.num_pairs:
            raise ValueError(f"mqar with num_pairs={self.num_pairs} needs train.seq_len of at least "
                             f"{4 * self.num_pairs}; got {seq_len}")

    def rows(self, draw: Draw, seq_len: int) -> Rows:
        """2 P ids of pairs, then (T - 2 P) // 2 places for a key and its value."""
        P = self.num_pairs
        keys = FIRST_KEY + draw.distinct("keys", P, self.num_keys)
        values = FIRST_KEY + self.num_keys + draw.integers("values", P, self.num_values)
        tokens = np.full((len(keys), seq_len), FILLER)
        tokens[:, 0:2 * P:2], tokens[:, 1:2 * P:2] = keys, values
        at = 2 * P + 2 * draw.distinct("places", P, (seq_len - 2 * P) // 2)
        np.put_along_axis(tokens, at, keys, axis=1)
        np.put_along_axis(tokens, at + 1, values, axis=1)
        targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        answers = np.zeros(tokens.shape, bool)
        np.put_along_axis(answers, at, True, axis=1)
        return one_example(tokens, targets, answers)

    def slices(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """None."""
        return {}
