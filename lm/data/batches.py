"""What every split has in common: batch `step` is rows step * B to step * B + B - 1, shared equally by the hosts."""

import math
from typing import Protocol

from lm.core.batch import Batch


class Reader(Protocol):
    """Rows by number, of an endless run over the data."""

    def rows(self, first: int, count: int) -> Batch:
        """Global rows first .. first + count - 1."""


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
