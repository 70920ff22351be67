"""What every split has in common: batch `step` is rows step * B to step * B + B - 1, shared equally by the hosts."""

import math
from typing import Any, Protocol

from lm.core.batch import Batch, MaskedBatch
from lm.core.goldfish import Goldfish, masked


class Reader(Protocol):
    """Rows by number, of an endless run over the data."""

    def rows(self, first: int, count: int) -> Batch:
        """Global rows first .. first + count - 1."""


class MaskedReader:
    """A reader's rows, out of which a mask took targets; what else the reader has is its own."""

    def __init__(self, reader: Any, goldfish: Goldfish) -> None:
        self._reader, self._goldfish = reader, goldfish

    def rows(self, first: int, count: int) -> MaskedBatch:
        """Global rows first .. first + count - 1. The number of a row is a uint32 to the mask, as it is on a device."""
        return masked(self._goldfish, self._reader.rows(first, count), first % 2**32)

    def read(self, places: list[tuple[int, int] | None]) -> Batch:
        """Rows for an evaluation: every target is seen."""
        return self._reader.read(places)

    @property
    def sources(self) -> list[Any]:
        return self._reader.sources


class StepBatches:
    """Batches by step, from a reader of rows. batch_size: of all hosts together."""

    batch_size: int
    num_rows_per_epoch: int
    reader: Reader

    def share(self, process_index: int, process_count: int) -> tuple[int, int]:
        """(first row of a process in a batch, rows of each). Raises ValueError where the batch cannot be shared."""
        if self.batch_size % process_count:
            raise ValueError(f"batch_size {self.batch_size} cannot be divided among {process_count} processes; make "
                             f"it a multiple of {process_count}")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index must be 0 to {process_count - 1}; got {process_index}")
        size = self.batch_size // process_count
        return process_index * size, size

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """This process's rows of batch `step`, each field [batch_size / process_count, seq_len]."""
        first, size = self.share(process_index, process_count)
        return self.reader.rows(step * self.batch_size + first, size)

    def num_eval_batches(self, limit: int | None = None) -> int:
        """How many batches `eval_batches` yields."""
        every = math.ceil(self.num_rows_per_epoch / self.batch_size)
        return every if limit is None else min(limit, every)
