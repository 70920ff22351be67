"""Rows that go on: the documents one after the other, cut into as many lanes as a batch has rows.

Row b of batch s + 1 continues row b of batch s, so that a state carried from step to step (truncated backpropagation
through time) belongs to the text before. Legend: B rows of a batch, T seq_len, W windows of a lane.
"""

from typing import NamedTuple

LANES = "lanes"  # its name among the ways of packing


class Place(NamedTuple):
    """epoch and row number of the plan; window: rows of this lane before it in the epoch."""

    epoch: int
    row: int
    window: int


class Lanes:
    """Lane b of an epoch is rows b W .. b W + W - 1 of the plan, one a batch.

    W is the number of full rows divided by B: fewer than B + 1 rows are left over at the end of an epoch, which are
    others in the next one because the documents then stand in another order.
    """

    def __init__(self, num_tokens: int, *, seq_len: int, batch_size: int) -> None:
        self._batch_size = batch_size
        self._windows = num_tokens // seq_len // batch_size
        if not self._windows:
            raise ValueError(f"data.packing='lanes' needs at least a row for each of the {batch_size} rows of a batch: "
                             f"{batch_size * seq_len} tokens, and there are {num_tokens}; lower train.batch_size or "
                             f"train.seq_len, or give more data")

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return self._windows * self._batch_size

    def __call__(self, index: int) -> Place:
        """Where the index-th row of an endless run over the data is."""
        epoch, index = divmod(int(index), self.num_rows)
        window, lane = divmod(index, self._batch_size)
        return Place(epoch, lane * self._windows + window, window)
