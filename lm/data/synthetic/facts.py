"""Random facts, seen again and again: how much does a model hold, whatever the rule that it cannot find?

Legend: n rows, T seq_len.
"""

import dataclasses

import numpy as np

from lm.core.fields import option
from lm.data.hashing import uniform
from lm.data.synthetic.base import Draw, Rows


@dataclasses.dataclass(frozen=True)
class Facts:
    """Examples of two ids, first and second key; the target at the second is the fact of this pair of keys.

    There are num_keys^2 facts, each one of num_classes ids, independent of the others. They are the task's, not the
    split's: validation asks for facts that training has shown, so that its accuracy is the share that was memorised.
    Ids: first keys, second keys, classes.
    """

    num_keys: int = option(128, "different first keys, and second keys: num_keys^2 facts")
    num_classes: int = option(64, "what a fact can be")
    draw: int = option(0, "number of the set of facts")
    part: tuple[int, int] = option((0, 1), "(k, n): first keys from the k-th of n equal parts alone, k from 0; facts "
                                           "of other parts are another domain")

    def check(self) -> None:
        """Raises ValueError for sizes below 1, and a part that is none."""
        if self.num_keys < 1 or self.num_classes < 1:
            raise ValueError(f"facts: num_keys={self.num_keys} and num_classes={self.num_classes} must be at least 1")
        k, n = self.part
        if n < 1 or self.num_keys % n or not 0 <= k < n:
            raise ValueError(f"facts: part={(k, n)} must be (k, n) with n a divisor of num_keys={self.num_keys} and k "
                             f"from 0 to n - 1")

    @property
    def vocab_size(self) -> int:
        return 2 * self.num_keys + self.num_classes

    def check_length(self, seq_len: int) -> None:
        """Raises ValueError where no example fits."""
        if seq_len < 2:
            raise ValueError(f"facts needs train.seq_len of at least 2; got {seq_len}")

    def facts(self) -> np.ndarray:
        """[num_keys, num_keys] int64: the class of each pair of first and second key."""
        pairs = np.arange(self.num_keys**2, dtype=np.uint64)
        drawn = uniform(pairs, "facts", self.draw) * self.num_classes
        return drawn.astype(np.int64).reshape(self.num_keys, self.num_keys)

    def rows(self, draw: Draw, seq_len: int) -> Rows:
        """seq_len // 2 examples, each with a position 0 of its own, and padding where one is left."""
        count = seq_len // 2
        k, n = self.part
        first = draw.integers("first", count, self.num_keys // n) + k * (self.num_keys // n)
        second = draw.integers("second", count, self.num_keys)
        tokens = np.zeros((len(first), seq_len), np.int64)
        targets, answers = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
        tokens[:, 0:2 * count:2], tokens[:, 1:2 * count:2] = first, self.num_keys + second
        targets[:, 1:2 * count:2] = 2 * self.num_keys + self.facts()[first, second]
        answers[:, 1:2 * count:2] = True
        present = np.arange(seq_len) < 2 * count
        return Rows(tokens, targets, answers, np.broadcast_to(np.where(present, np.arange(seq_len) % 2, -1),
                                                              tokens.shape))

    def slices(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """None."""
        return {}
