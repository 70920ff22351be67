"""Plans of rows: which piece of which document stands where, from document lengths alone.

Legend: N documents, T seq_len. A piece is (document, start, length): inputs start .. start+length of that document.
Both plans give every input of every document to exactly one row of an epoch.
"""

from typing import NamedTuple

import numpy as np

from lm.data.hashing import permutation
from lm.data.recent import Recent

_BLOCK = 1 << 20  # elements of the [windows, rows] table that first-fit works on at once


class Pieces(NamedTuple):
    """The pieces of one row in order, each field [number of pieces] int64. position: of the first input; above 0 only
    where the row goes on with the document of another."""

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    position: np.ndarray


def first_fit(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packs many windows at once, the longest item first, each into the first row with room for it.

    lengths: [G, N] with values 0 .. T-1; items of length 0 are ignored. Every window is packed on its own; a Python
    step places one item of all windows, which is what makes millions of documents plannable in numpy.
    Returns (row [G, N], start in the row [G, N], number of rows [G]); the first two are undefined for empty items.
    """
    groups, items = lengths.shape
    order = np.argsort(-lengths, axis=1, kind="stable")
    lengths = np.take_along_axis(lengths, order, 1).astype(np.int32)
    total = lengths.sum(1, dtype=np.int64)
    # Two rows opened one after the other hold more than T together, so first-fit opens at most 2 * total / T + 1.
    most = int(min(items, 2 * total.max(initial=0) // seq_len + 1))
    free = np.full((groups, max(most, 1)), seq_len, np.int32)
    every = np.arange(groups)
    row, start = np.zeros(lengths.shape, np.int64), np.zeros(lengths.shape, np.int64)
    opened = 1
    for item in range(int((lengths > 0).sum(1).max(initial=0))):
        size = lengths[:, item]
        chosen = (free[:, :opened] >= size[:, None]).argmax(1)
        room = free[every, chosen]
        row[:, item], start[:, item] = chosen, seq_len - room
        free[every, chosen] = room - size
        # One row beyond the last one touched stays in view: it always has room.
        opened = min(max(opened, int(chosen.max()) + 2), free.shape[1])
    back_row, back_start = np.empty_like(row), np.empty_like(start)
    np.put_along_axis(back_row, order, row, 1)
    np.put_along_axis(back_start, order, start, 1)
    return back_row, back_start, (free < seq_len).sum(1)


class FirstFit:
    """Documents up to T stay whole; of longer ones every full T inputs are a row, and the rest is packed.

    The documents are shuffled once and cut into windows of about `window`; windows are packed separately, so that the
    plan of a window is made when it is needed. Only the number of rows of each window is kept. The packing is the same
    in every epoch (pieces of a document never depend on their neighbours); what an epoch shuffles is the rows.
    """

    def __init__(self, lengths: np.ndarray, seq_len: int, *, key: int, window: int | None, shuffle: bool) -> None:
        n = len(lengths)
        self._lengths, self._seq_len = lengths, seq_len
        self._order = permutation(n, key, "packing") if shuffle else np.arange(n)
        if window is None:
            # Enough documents for 256 rows, so that the one row left part empty in a window is under half a percent.
            window = int(np.clip(256 * seq_len * n // max(int(np.minimum(lengths, seq_len).sum()), 1), 1024, 65536))
        count = max(1, round(n / window))
        self._bounds = np.linspace(0, n, count + 1).astype(np.int64)
        self.row_bounds = np.concatenate([[0], np.cumsum(self._count_rows())])
        self._plan = Recent(self._plan_window, 8)

    @property
    def num_rows(self) -> int:
        return int(self.row_bounds[-1])

    def _rests(self, first: int, last: int) -> np.ndarray:
        """[last - first, widest window]: what is left of each document after its full rows, padded with 0."""
        sizes = np.diff(self._bounds[first:last + 1])
        table = np.zeros((last - first, int(sizes.max())), np.int64)
        documents = self._order[self._bounds[first]:self._bounds[last]]
        table[np.arange(table.shape[1]) < sizes[:, None]] = self._lengths[documents] % self._seq_len
        return table

    def _count_rows(self) -> np.ndarray:
        full = np.concatenate([[0], np.cumsum((self._lengths // self._seq_len)[self._order])])
        rows = np.diff(full[self._bounds])
        widest = int(np.diff(self._bounds).max())
        block = max(1, _BLOCK // widest)
        for first in range(0, len(rows), block):
            last = min(first + block, len(rows))
            rows[first:last] += first_fit(self._rests(first, last), self._seq_len)[2]
        return rows

    def _plan_window(self, window: int) -> tuple[Pieces, np.ndarray]:
        """Pieces of a window sorted by row, and where the pieces of each row begin."""
        documents = self._order[self._bounds[window]:self._bounds[window + 1]]
        lengths = self._lengths[documents]
        full, rest = lengths // self._seq_len, lengths % self._seq_len
        rest_row, rest_start, _ = first_fit(rest[None], self._seq_len)
        num_full = int(full.sum())
        which = np.repeat(np.arange(len(documents)), full)
        nth = np.arange(num_full) - np.repeat(np.cumsum(full) - full, full)
        tail = np.flatnonzero(rest)
        tail = tail[np.lexsort((rest_start[0, tail], rest_row[0, tail]))]
        pieces = Pieces(
            np.concatenate([documents[which], documents[tail]]),
            np.concatenate([nth * self._seq_len, full[tail] * self._seq_len]),
            np.concatenate([np.full(num_full, self._seq_len), rest[tail]]),
            np.zeros(num_full + len(tail), np.int64),
        )
        row = np.concatenate([np.arange(num_full), num_full + rest_row[0, tail]])
        num_rows = int(self.row_bounds[window + 1] - self.row_bounds[window])
        return pieces, np.searchsorted(row, np.arange(num_rows + 1))

    def pieces(self, epoch: int, row: int) -> Pieces:
        """The pieces of a row; `row` counts in the order of the plan, before the epoch's shuffle."""
        del epoch
        window = int(np.searchsorted(self.row_bounds, row, "right")) - 1
        pieces, begin = self._plan(window)
        at = row - int(self.row_bounds[window])
        return Pieces(*(field[begin[at]:begin[at + 1]] for field in pieces))


class Concat:
    """Documents one after the other, cut every T inputs; the last row alone is padded.

    The order of the documents is new in every epoch, so the cuts are too; the number of rows is not.
    """

    def __init__(self, lengths: np.ndarray, seq_len: int, *, key: int, window: int | None, shuffle: bool) -> None:
        self._lengths, self._seq_len, self._key, self._shuffle = lengths, seq_len, key, shuffle
        self.num_rows = -(-int(lengths.sum()) // seq_len)
        self.row_bounds = np.append(np.arange(0, self.num_rows, window or 65536), self.num_rows)
        self._epoch = Recent(self._order, 2)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        n = len(self._lengths)
        order = permutation(n, self._key, "packing", epoch) if self._shuffle else np.arange(n)
        return order, np.concatenate([[0], np.cumsum(self._lengths[order])])

    def pieces(self, epoch: int, row: int) -> Pieces:
        """The pieces of a row; `row` counts in the order of the plan, before the epoch's shuffle."""
        order, bounds = self._epoch(epoch)
        begin = row * self._seq_len
        end = min(begin + self._seq_len, int(bounds[-1]))
        first, last = np.searchsorted(bounds, begin, "right") - 1, np.searchsorted(bounds, end, "left")
        start = np.maximum(bounds[first:last], begin)
        stop = np.minimum(bounds[first + 1:last + 1], end)
        return Pieces(order[first:last], start - bounds[first:last], stop - start, np.zeros(last - first, np.int64))


class Single:
    """One document a row, cut every T inputs; what a row has left over is padding."""

    def __init__(self, lengths: np.ndarray, seq_len: int, *, key: int, window: int | None, shuffle: bool) -> None:
        del key, shuffle  # rows are shuffled by `RowOrder`, and here a row is nothing but a piece
        self._lengths, self._seq_len = lengths, seq_len
        self._bounds = np.concatenate([[0], np.cumsum(-(-lengths // seq_len))])
        self.num_rows = int(self._bounds[-1])
        self.row_bounds = np.append(np.arange(0, self.num_rows, window or 65536), self.num_rows)

    def pieces(self, epoch: int, row: int) -> Pieces:
        """The piece of a row; `row` counts in the order of the plan, before the epoch's shuffle."""
        del epoch
        document = np.searchsorted(self._bounds, row, "right") - 1
        start = (row - self._bounds[document]) * self._seq_len
        length = min(int(self._lengths[document]) - start, self._seq_len)
        return Pieces(*(np.array([value], np.int64) for value in (document, start, length, 0)))


PACKINGS = {"first_fit": FirstFit, "concat": Concat, "single": Single}


class RowOrder:
    """The order in which an epoch visits the rows of a plan: windows shuffled, and the rows inside each window.

    Neighbouring rows come from the same window, so a window is planned once an epoch; each window is itself a random
    sample of the documents.
    """

    def __init__(self, row_bounds: np.ndarray, *, key: int, shuffle: bool) -> None:
        self._bounds, self._key, self._shuffle = row_bounds, key, shuffle
        self._windows = Recent(self._shuffle_windows, 2)
        self._rows = Recent(self._shuffle_rows, 4)

    def _shuffle_windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(len(self._bounds) - 1, self._key, "windows", epoch)
        return order, np.concatenate([[0], np.cumsum(np.diff(self._bounds)[order])])

    def _shuffle_rows(self, epoch: int, window: int) -> np.ndarray:
        return permutation(int(self._bounds[window + 1] - self._bounds[window]), self._key, "rows", epoch, window)

    def __call__(self, index: int) -> tuple[int, int]:
        """(epoch, row of the plan) of the index-th row of an endless run over the data."""
        epoch, index = divmod(int(index), int(self._bounds[-1]))
        if not self._shuffle:
            return epoch, index
        order, bounds = self._windows(epoch)
        at = int(np.searchsorted(bounds, index, "right")) - 1
        window = int(order[at])
        return epoch, int(self._bounds[window] + self._rows(epoch, window)[index - bounds[at]])
