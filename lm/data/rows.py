"""The endless sequence of packed rows of one source, and how pieces become arrays.

Legend: B rows, T seq_len.
"""

from collections.abc import Sequence

import numpy as np

from lm.core.batch import Batch, TaughtBatch
from lm.data.corpora import Part
from lm.data.corpus import Corpus
from lm.data.lanes import Lanes
from lm.data.packing import PACKINGS, Concat, Pieces, RowOrder


def empty_batch(batch_size: int, seq_len: int, k: int | None = None) -> Batch | TaughtBatch:
    """Rows of padding: weight 0, segment 0, positions from 0; with `k`, rows for that many tokens of a teacher."""
    shape = (batch_size, seq_len)
    zeros = lambda dtype: np.zeros(shape, dtype)
    positions = np.broadcast_to(np.arange(seq_len, dtype=np.int32), shape).copy()
    batch = Batch(zeros(np.int32), zeros(np.int32), zeros(np.float32), zeros(np.int32), positions)
    if k is None:
        return batch
    uniform = np.full((*shape, k + 1), -np.log(k + 1), np.float32)
    return TaughtBatch(*batch, np.zeros((*shape, k), np.int32), uniform)


def fill_rows(batch: Batch | TaughtBatch, rows: Sequence[int], pieces: Sequence[Pieces], corpus: Corpus) -> None:
    """Writes the i-th pieces into row rows[i] of a batch made by `empty_batch`, in place."""
    seq_len = batch.tokens.shape[1]
    counts = np.array([len(p.document) for p in pieces])
    document, start, length, begin = (np.concatenate(column) for column in zip(*pieces, strict=True))
    inputs, targets, known = corpus.gather(document, start, length)
    before = np.cumsum(length) - length  # of each piece, over all rows
    first = np.cumsum(counts) - counts  # of each row, over all pieces
    in_row = before - np.repeat(before[first], counts)
    row = np.repeat(np.asarray(rows), counts)
    position = np.arange(len(inputs)) - np.repeat(before, length)
    at = np.repeat(row * seq_len + in_row, length) + position
    flat = Batch(*(field.reshape(-1) for field in batch[:len(Batch._fields)]))
    # The padding tail starts over at 0 where the documents end.
    filled = np.add.reduceat(length, first)
    batch.positions[np.asarray(rows)] = np.arange(seq_len, dtype=np.int32) - filled[:, None]
    flat.tokens[at] = inputs
    flat.targets[at] = np.where(known, targets, 0)
    flat.weights[at] = known if corpus.weights is None else known * np.repeat(corpus.weights[document], length)
    if isinstance(batch, TaughtBatch):
        for field, values in zip(batch[len(Batch._fields):], corpus.teacher.gather(document, start, length, known),
                                 strict=True):
            field.reshape(-1, field.shape[-1])[at] = values
    flat.segment_ids[at] = np.repeat(np.arange(len(length)) - np.repeat(first, counts) + 1, length)
    flat.positions[at] = position + np.repeat(begin, length)


class Rows:
    """Packed rows of one source. Row i is a function of (documents, options, seed, i) alone, epoch after epoch.

    num_rows: rows of an epoch. num_inputs: tokens of an epoch that stand in rows.
    """

    def __init__(self, part: Part, *, seq_len: int, packing: str, window: int | None, shuffle: bool, key: int,
                 name: str) -> None:
        self.part, self.seq_len, self.name = part, seq_len, name
        lengths = part.corpus.inputs[part.documents]
        self._plan = PACKINGS[packing](lengths, seq_len, key=key, window=window, shuffle=shuffle)
        self._order = RowOrder(self._plan.row_bounds, key=key, shuffle=shuffle)
        self.num_rows, self.num_inputs = self._plan.num_rows, int(lengths.sum())

    @property
    def packing_efficiency(self) -> float:
        """Share of positions that are not padding."""
        return self.num_inputs / (self.num_rows * self.seq_len)

    def pieces(self, index: int) -> Pieces:
        """What stands in the index-th row; `document` numbers the whole corpus."""
        found = self._plan.pieces(*self._order(index))
        return found._replace(document=self.part.documents[found.document])


class LaneRows:
    """Rows of one source in lanes: row i goes on where row i - batch_size ended, with the positions of its document.

    num_rows: rows of an epoch. num_inputs: tokens of an epoch that stand in rows.
    """

    packing_efficiency = 1.0

    def __init__(self, part: Part, *, seq_len: int, batch_size: int, shuffle: bool, key: int, name: str) -> None:
        self.part, self.seq_len, self.name = part, seq_len, name
        lengths = part.corpus.inputs[part.documents]
        self._plan = Concat(lengths, seq_len, key=key, window=None, shuffle=shuffle)
        self._lanes = Lanes(int(lengths.sum()), seq_len=seq_len, batch_size=batch_size)
        self.num_rows, self.num_inputs = self._lanes.num_rows, self._lanes.num_rows * seq_len

    def pieces(self, index: int) -> Pieces:
        """What stands in the index-th row; `document` numbers the whole corpus."""
        place = self._lanes(index)
        found = self._plan.pieces(place.epoch, place.row)
        # A row begins inside a document where it goes on; one that was cut by the start of the lane begins there.
        return found._replace(document=self.part.documents[found.document],
                              position=np.minimum(found.start, place.window * self.seq_len))
