"""Batches as a pure function of (seed, step), and grain's background reading of them.

Global row r of a run is a function of the data options, the seed and r. Batch `step` is rows step * B to
step * B + B - 1, of which host p of P takes the p-th of P equal slices. So the state of the iterator is the step, and
any number of hosts, threads or workers sees the same batches.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lm.core.batch import Batch
from lm.core.fields import check_known
from lm.core.goldfish import Goldfish
from lm.data.batches import MaskedReader, StepBatches
from lm.data.corpora import Corpora, Part, load_corpora
from lm.data.hashing import digest, fold
from lm.data.lanes import LANES
from lm.data.mixture import choose, proportions
from lm.data.options import PAIRS, DataOptions, data_options
from lm.data.preference.dataset import PairDataset
from lm.data.rows import LaneRows, Rows, empty_batch, fill_rows
from lm.data.synthetic import TASKS
from lm.data.synthetic.dataset import SyntheticDataset
from lm.data.teacher import Teacher
from lm.data.tokenizer import Tokenizer

SPLITS = ("train", "validation")


class RowReader:
    """Rows of a mixture by number. Small to send to worker processes: no tokenizer, no caches."""

    def __init__(self, sources: list[Rows] | list[LaneRows], shares: tuple[int, ...], seq_len: int,
                 k: int | None = None) -> None:
        self.sources, self.shares, self.seq_len, self._k = sources, shares, seq_len, k

    def read(self, places: list[tuple[int, int] | None]) -> Batch:
        """The batch of (source, row of that source); None gives a row of padding."""
        batch = empty_batch(len(places), self.seq_len, self._k)
        for number, source in enumerate(self.sources):
            rows = [i for i, place in enumerate(places) if place is not None and place[0] == number]
            if rows:
                fill_rows(batch, rows, [source.pieces(places[i][1]) for i in rows], source.part.corpus)
        return batch

    def rows(self, first: int, count: int) -> Batch:
        """Global rows first .. first + count - 1."""
        return self.read([choose(k, self.shares) for k in range(first, first + count)])


class TokenDataset(StepBatches):
    """One split of the data, packed for one batch size and sequence length.

    tokenizer, split, batch_size, seq_len: as given.
    num_rows_per_epoch: rows that hold every token of every source once.
    num_documents, num_tokens (with bos and eos), num_targets (tokens to be learned), num_bytes (UTF-8): counts of the
      split. bytes_per_target: mean UTF-8 bytes of a target.
    packing_efficiency: share of positions that are not padding, over the mixture as it is sampled.
    token_bytes: [vocab_size] float64, UTF-8 bytes that a target stands for, scaled so that they add up to num_bytes
      over the split; bits per byte is sum(weights * bits) / sum(weights * token_bytes[targets]).
    teacher: whose predictions come with every batch, or None.
    fingerprint: of everything that decides the batches.
    """

    def __init__(self, corpora: Corpora, options: DataOptions, *, split: str, seed: int, batch_size: int,
                 seq_len: int) -> None:
        self.tokenizer, self.split, self.batch_size, self.seq_len = corpora.tokenizer, split, batch_size, seq_len
        self._corpora, self._options, self._seed = corpora, options, seed
        parts = getattr(corpora, split)
        # A source that stands alone is shuffled the same whatever its name: prepared or not, the batches are equal.
        keys = {name: fold(seed, name if len(parts) > 1 else "") for name in parts}
        common = {name: dict(seq_len=seq_len, shuffle=options.shuffle, key=keys[name], name=name) for name in parts}
        if options.packing == LANES and split == "train":
            sources = [LaneRows(part, batch_size=batch_size, **common[name]) for name, part in parts.items()]
        else:  # what is evaluated starts afresh in every row
            packing = "concat" if options.packing == LANES else options.packing
            sources = [Rows(part, packing=packing, window=options.packing_window, **common[name])
                       for name, part in parts.items()]
        # Rows are equally long, so shares of tokens are shares of rows, corrected for padding.
        rates = [s.part.weight * (1 / s.packing_efficiency if options.mixture == "tokens"
                                  else s.num_rows / len(s.part.documents)) for s in sources]
        self._shares = proportions(rates)
        # What is evaluated is compared with the text, not with a teacher.
        self.teacher = teacher_of(parts) if split == "train" else None
        self.reader = RowReader(sources, self._shares, seq_len, self.teacher and self.teacher.k)
        self.num_rows_per_epoch = sum(s.num_rows for s in sources)
        shares = np.array(self._shares) / sum(self._shares)
        self.packing_efficiency = float(sum(shares * [s.packing_efficiency for s in sources]))
        self.num_documents = sum(len(p.documents) for p in parts.values())
        self.num_tokens = sum(int(p.corpus.streams[p.documents].sum()) for p in parts.values())
        self.num_targets = sum(int(p.corpus.num_targets[p.documents].sum()) for p in parts.values())
        self.num_bytes = sum(int(p.corpus.table.num_bytes[p.documents].sum()) for p in parts.values())
        learned = sum(int(p.corpus.target_bytes[p.documents].sum()) for p in parts.values())
        self.bytes_per_target = learned / max(self.num_targets, 1)
        counted = sum(int(p.corpus.table.token_bytes[p.documents].sum()) for p in parts.values())
        self.token_bytes = self.tokenizer.token_bytes * (self.num_bytes / max(counted, 1))
        self.fingerprint = digest(
            [[keys[name], p.corpus.fingerprint, digest(p.documents), p.weight] for name, p in parts.items()],
            [split, seed, batch_size, seq_len, options.packing, options.packing_window, options.shuffle,
             options.mixture, *(["documents"] if options.weigh == "documents" else []),
             *([p.corpus.teacher.fingerprint for p in parts.values()] if self.teacher else [])])

    def eval_batches(self, limit: int | None = None, process_index: int = 0,
                     process_count: int = 1) -> Iterator[Batch]:
        """Every row of the split once, or the first `limit` batches of them; the last batch is filled up with padding.

        The sources are interleaved in proportion to their sizes, so that a limited evaluation is a fair sample. The
        order of the rows does not depend on the batch size.
        """
        first, size = self.share(process_index, process_count)
        sizes = [s.num_rows for s in self.reader.sources]
        for number in range(self.num_eval_batches(limit)):
            begin = number * self.batch_size + first
            places = [choose(k, sizes) if k < self.num_rows_per_epoch else None for k in range(begin, begin + size)]
            yield self.reader.read(places)

    def target_blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(input, target) pairs of the whole split, each once, in blocks: what n-gram counts are made from."""
        for source in self.reader.sources:
            yield from source.part.corpus.blocks(source.part.documents)

    def slices(self) -> "dict[str, TokenDataset]":
        """Parts of the targets that are evaluated by themselves: the sources of a mixture of chats, such as long and
        short answers. Other text has none."""
        parts = getattr(self._corpora, self.split)
        if len(parts) < 2 or not all(part.corpus.whole for part in parts.values()):
            return {}
        return {name: TokenDataset(self._corpora._replace(**{self.split: {name: part}}), self._options,
                                   split=self.split, seed=self._seed, batch_size=self.batch_size, seq_len=self.seq_len)
                for name, part in parts.items()}

    def describe(self) -> dict[str, Any]:
        """Counts of the split and of each source, as plain values for logs and for the workdir."""
        shares = np.array(self._shares) / sum(self._shares)
        return {
            "split": self.split, "documents": self.num_documents, "tokens": self.num_tokens, "bytes": self.num_bytes,
            "rows_per_epoch": self.num_rows_per_epoch, "packing_efficiency": round(self.packing_efficiency, 6),
            "vocab_size": self.tokenizer.vocab_size, "fingerprint": self.fingerprint,
            "sources": {s.name: {
                "documents": len(s.part.documents), "tokens": int(s.part.corpus.streams[s.part.documents].sum()),
                "targets": int(s.part.corpus.num_targets[s.part.documents].sum()),
                "rows_per_epoch": s.num_rows, "share_of_rows": round(float(share), 6),
                "packing_efficiency": round(s.packing_efficiency, 6),
            } for s, share in zip(self.reader.sources, shares, strict=True)},
        }


Dataset = TokenDataset | SyntheticDataset | PairDataset


def build_dataset(options: DataOptions | Mapping, *, tokenizer: Tokenizer | None = None, split: str = "train",
                  seed: int = 0, batch_size: int, seq_len: int, corpora: Corpora | None = None,
                  goldfish: Goldfish | None = None) -> Dataset:
    """The `split` ("train" or "validation") of the data that `options` describe.

    `corpora` (from `load_corpora`) avoids reading the data again for the second split. The validation split is ordered
    by `split_seed`, so that every run evaluates on the same rows. goldfish: a mask of training targets, made with the
    rows; other splits never have one. Raises ValueError for data that cannot be read, a split without documents, or a
    sequence longer than all training data.
    """
    made = _build(data_options(options), tokenizer, split, seed, batch_size, seq_len, corpora)
    if goldfish is not None and split == "train":
        made.reader = MaskedReader(made.reader, goldfish)
    return made


def _build(options: DataOptions, tokenizer: Tokenizer | None, split: str, seed: int, batch_size: int, seq_len: int,
           corpora: Corpora | None) -> Dataset:
    check_known([split], SPLITS, "the data", "split")
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    corpora = load_corpora(options, tokenizer) if corpora is None else corpora
    parts = getattr(corpora, split)
    if not parts:
        raise ValueError("there is no validation data: data.validation_fraction is 0 and data.validation is not given; "
                         "set one of them, or do not evaluate")
    seed = options.split_seed if split == "validation" else seed
    for name, task in parts.items():
        if isinstance(task, tuple(TASKS.values())):
            return SyntheticDataset(name, task, split=split, seed=seed, batch_size=batch_size, seq_len=seq_len)
    if options.kind == PAIRS:
        return PairDataset(corpora, options, split=split, seed=seed, batch_size=batch_size, seq_len=seq_len)
    if options.packing in ("first_fit", "single"):
        check_whole(parts, seq_len)
    inputs = sum(int(p.corpus.inputs[p.documents].sum()) for p in parts.values())
    if split == "train" and seq_len > inputs:
        raise ValueError(f"seq_len {seq_len} is longer than all training data, {inputs} tokens; set train.seq_len to "
                         f"at most {inputs}, or give more data")
    return TokenDataset(corpora, options, split=split, seed=seed, batch_size=batch_size, seq_len=seq_len)


def teacher_of(parts: Mapping[str, Part]) -> Teacher | None:
    """The teacher of a mixture, None without. Raises ValueError where only some sources have one, or unlike ones."""
    found = {name: part.corpus.teacher for name, part in parts.items()}
    kinds = {name: teacher and (teacher.k, teacher.temperature) for name, teacher in found.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError("the sources of a mixture need predictions of a teacher alike, or none: " + ", ".join(
            f"{name} has " + (f"{kind[0]} tokens at temperature {kind[1]:g}" if kind else "none")
            for name, kind in kinds.items()))
    return next(iter(found.values()))


def check_whole(parts: Mapping[str, Part], seq_len: int) -> None:
    """Raises ValueError where a row would cut a chat: the rest would be learned without what it answers."""
    for name, part in parts.items():
        lengths = part.corpus.inputs[part.documents]
        longer = int((lengths > seq_len).sum())
        if part.corpus.whole and longer:
            raise ValueError(f"source {name!r}: {longer:,} of {len(lengths):,} chats are longer than seq_len {seq_len} "
                             f"(up to {lengths.max():,} tokens); set train.seq_len higher, prepare them with "
                             f"--max-tokens {seq_len}, or let rows cut them with data.packing='concat'")


class _Steps:
    """A random-access source for grain: element i is (first + i, batch of that step)."""

    def __init__(self, dataset: Dataset, first: int, process_index: int, process_count: int) -> None:
        offset, self._size = dataset.share(process_index, process_count)
        self._reader, self._batch_size, self._first, self._offset = dataset.reader, dataset.batch_size, first, offset

    def __len__(self) -> int:
        return 1 << 48

    def __getitem__(self, index: int) -> tuple[int, Batch]:
        step = self._first + int(index)
        return step, self._reader.rows(step * self._batch_size + self._offset, self._size)


def iterate(dataset: Dataset, start_step: int = 0, *, process_index: int = 0, process_count: int = 1,
            num_threads: int = 1, prefetch: int = 8, num_workers: int = 0) -> Iterator[tuple[int, Batch]]:
    """(step, `dataset.batch(step)`) from `start_step` on without end, made ahead in the background by grain.

    `num_threads` threads keep up to `prefetch` batches ready; 0 of either makes batches when they are asked for.
    `num_workers` processes do it instead where above 0. Close the generator to stop the background work.
    """
    import grain
    from absl import flags

    if num_workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, which only absl.app parses by itself
    steps = grain.MapDataset.source(_Steps(dataset, start_step, process_index, process_count))
    ahead = num_threads > 0 and prefetch > 0
    reading = grain.ReadOptions(num_threads=num_threads if ahead else 0, prefetch_buffer_size=prefetch if ahead else 0)
    batches = steps.to_iter_dataset(reading)
    if num_workers:
        each = max(1, prefetch // num_workers)
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=each))
    iterator = iter(batches)
    try:
        yield from iterator
    finally:
        iterator.close()
