"""Copies of copies: each token says from how far back it copies, and a chain of them leads to a value.

Legend: n rows, T seq_len, W width of a block, H blocks that copy.
"""

import dataclasses

import numpy as np

from lm.core.fields import option
from lm.data.synthetic.base import Draw, Rows, one_example


@dataclasses.dataclass(frozen=True)
class CopyChain:
    """A row is blocks of W tokens. The first holds W different values. Each later one copies the block before it in an
    order of its own: its tokens are distances o, and the target of each is the target of the token o places before.
    Weight is on these.

    A token of the h-th block that copies needs h hops, one after the other. An answer that is found stays right however
    many more are made. All values are in every block: chance is 1 / W.

    Ids: 0 to num_values - 1 are values, the 2 W - 1 after them the distances 1 to 2 W - 1.
    """

    width: int = option(4, "tokens of a block; a row holds as many blocks as fit")
    num_values: int = option(8, "different values")
    report: tuple[int, ...] = option((), "numbers of hops h whose answers are evaluated by themselves, as set hops_<h>")

    def check(self) -> None:
        """Raises ValueError for sizes that leave no row."""
        if self.width < 1:
            raise ValueError(f"copy_chain: width={self.width} must be at least 1")
        if self.num_values < self.width:
            raise ValueError(f"copy_chain: the values of a row are different, and num_values={self.num_values} is less "
                             f"than width={self.width}; give more values or shorter blocks")
        if any(h < 1 for h in self.report):
            raise ValueError(f"copy_chain: report={self.report} must be numbers of hops from 1")

    @property
    def vocab_size(self) -> int:
        return self.num_values + 2 * self.width - 1

    def check_length(self, seq_len: int) -> None:
        """Raises ValueError where no block copies, or too few for the hops that are reported."""
        least = self.width * (1 + max((1, *self.report)))
        if seq_len < least:
            raise ValueError(f"copy_chain with width={self.width}, report={self.report} needs train.seq_len of at "
                             f"least {least}; got {seq_len}")

    def rows(self, draw: Draw, seq_len: int) -> Rows:
        """W values, H blocks of W distances, padding."""
        W, H = self.width, seq_len // self.width - 1
        values = draw.distinct("values", W, self.num_values)
        source = np.stack([draw.distinct(f"block {h}", W, W) for h in range(H)], axis=1)  # [n, H, W]
        distances = W + np.arange(W) - source
        blocks = [values]
        for h in range(H):
            blocks.append(np.take_along_axis(blocks[-1], source[:, h], axis=1))
        tail = np.zeros((len(values), seq_len - W * (H + 1)), np.int64)
        tokens = np.concatenate([values, self.num_values + distances.reshape(-1, H * W) - 1, tail], axis=1)
        targets = np.concatenate([*blocks, tail], axis=1)
        place = np.arange(seq_len)
        copies = np.broadcast_to((place >= W) & (place < W * (H + 1)), tokens.shape)
        made = one_example(tokens, targets, copies)
        return made._replace(positions=np.where(place < W * (H + 1), made.positions, -1))

    def slices(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """`hops_<h>` of each h in `report`."""
        return {f"hops_{h}": positions // self.width == h for h in self.report}
