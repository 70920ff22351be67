"""Batches of a synthetic task, with the members of `lm.data.loader.TokenDataset` that a run and an evaluation use."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from lm.core.batch import Batch
from lm.data.batches import StepBatches
from lm.data.hashing import digest, fold
from lm.data.synthetic.base import Draw, Task
from lm.data.synthetic.ids import Ids

VALIDATION_ROWS = 1024  # an evaluation without a limit stops here; training never ends


class RowMaker:
    """Rows by number, in any order. Small to send to worker processes. only: name of a slice; None is all answers."""

    def __init__(self, task: Task, key: int, seq_len: int, only: str | None = None) -> None:
        if only is not None and hasattr(task, "of_slice"):  # whole rows are of one slice: none of another is made
            task = task.of_slice(only)
        self.task, self.key, self.seq_len, self.only = task, key, seq_len, only

    def rows(self, first: int, count: int) -> Batch:
        """Global rows first .. first + count - 1, each field [count, seq_len]."""
        made = self.task.rows(Draw(self.key, np.arange(first, first + count)), self.seq_len)
        present = made.positions >= 0
        answers = made.answers & present
        if self.only is not None:
            answers = answers & self.task.slices(made.positions)[self.only]
        counted = np.cumsum(made.positions == 0, axis=1)
        segments = np.where(present, counted if made.segments is None else made.segments, 0)
        targets = np.where(answers if made.segments is None else present, made.targets, 0)
        # The padding tail counts on from 0, as that of packed rows does.
        tail = np.cumsum(~present, axis=1) - 1
        return Batch(made.tokens.astype(np.int32), targets.astype(np.int32), answers.astype(np.float32),
                     segments.astype(np.int32), np.where(present, made.positions, tail).astype(np.int32))


class SyntheticDataset(StepBatches):
    """One split of a task for one batch size and sequence length. Every training row is new; the validation rows are
    the same at every evaluation and for every training seed.

    num_tokens, num_bytes, num_targets are 0: there is no corpus. token_bytes is None: there are no bytes to divide by.
    """

    num_tokens = num_bytes = num_targets = 0
    token_bytes = None
    packing_efficiency = 1.0

    def __init__(self, name: str, task: Task, *, split: str, seed: int, batch_size: int, seq_len: int,
                 only: str | None = None) -> None:
        task.check_length(seq_len)
        self.name, self.task, self.split, self._seed = name, task, split, seed
        self.batch_size, self.seq_len, self.only = batch_size, seq_len, only
        self.tokenizer, self.pairs = Ids(task.vocab_size), getattr(task, "pairs", False)
        self.reader = RowMaker(task, fold(seed, name, split), seq_len, only)
        self.num_rows_per_epoch = VALIDATION_ROWS
        self.fingerprint = digest(name, dataclasses.asdict(task), [split, seed, batch_size, seq_len, only])

    def eval_batches(self, limit: int | None = None, process_index: int = 0, process_count: int = 1
                     ) -> Iterator[Batch]:
        """The first batches of the split, at most `limit` of them."""
        for step in range(self.num_eval_batches(limit)):
            yield self.batch(step, process_index, process_count)

    def slices(self) -> dict[str, "SyntheticDataset"]:
        """Name to the same rows with weight on a part of the answers."""
        return {name: SyntheticDataset(self.name, self.task, split=self.split, seed=self._seed, only=name,
                                       batch_size=self.batch_size, seq_len=self.seq_len)
                for name in self.task.slices(np.zeros((1, 1), np.int64))}

    def describe(self) -> dict[str, Any]:
        """What the split is, as plain values."""
        return {"split": self.split, "task": self.name, **dataclasses.asdict(self.task),
                "vocab_size": self.task.vocab_size, "fingerprint": self.fingerprint, "sources": {}}
