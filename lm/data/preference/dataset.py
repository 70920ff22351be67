"""Packed rows of pairs: a row holds whole groups, so that a pair is never divided.

Legend: B rows, T seq_len, G groups, R rows of an epoch.
"""

import hashlib
import io
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from lm.core.batch import Batch, ReferencedBatch
from lm.data.batches import StepBatches
from lm.data.corpora import Corpora, Part
from lm.data.hashing import digest, fold
from lm.data.options import PAIRS, DataOptions
from lm.data.packing import FirstFit, RowOrder, Single
from lm.data.preference.groups import KINDS, Groups, fit, group
from lm.data.preference.places import first_of
from lm.data.preference.prepare import PAIRS_FILE, PLACES_FILE
from lm.data.prepared import read_manifest
from lm.data.rows import empty_batch

log = logging.getLogger(__name__)


class PairReader:
    """Rows by number. reference: [R, T] float32, log-probabilities of the targets of every row of the plan, or None."""

    def __init__(self, part: Part, groups: Groups, prompts: np.ndarray, plan: Any, order: RowOrder, seq_len: int
                 ) -> None:
        self.corpus, self.groups, self.prompts = part.corpus, groups, prompts
        self.plan, self.order, self.seq_len = plan, order, seq_len
        self.reference: np.ndarray | None = None

    def rows(self, first: int, count: int) -> Batch | ReferencedBatch:
        """Global rows first .. first + count - 1."""
        return self.read([self.order(number)[1] for number in range(first, first + count)])

    def read(self, rows: list[int | None]) -> Batch | ReferencedBatch:
        """Rows of the plan; None gives one of padding."""
        batch = empty_batch(len(rows), self.seq_len)
        for i, row in enumerate(rows):
            at = 0
            for place, number in enumerate([] if row is None else self.in_row(row)):
                for kind in range(KINDS):
                    at += self._write(batch, i, at, place, int(number), kind)
            batch.positions[i, at:] = np.arange(self.seq_len - at, dtype=np.int32)
        if self.reference is None:
            return batch
        nothing = np.zeros(self.seq_len, np.float32)
        reference = np.stack([nothing if row is None else self.reference[row] for row in rows])
        # Pairs that the reference could not score are left out whole.
        for i in np.flatnonzero(~np.isfinite(reference).all(axis=1)):
            groups = (batch.segment_ids[i] - 1) // KINDS
            batch.weights[i, np.isin(groups, groups[~np.isfinite(reference[i])])] = 0
        return ReferencedBatch(*batch, np.nan_to_num(reference, posinf=0, neginf=0))

    def in_row(self, row: int) -> np.ndarray:
        """Numbers of the groups of a row of the plan."""
        return self.plan.pieces(0, row).document

    def inside(self, row: int) -> np.ndarray:
        """[T]: the number within a row of the plan of the group at each position, -1 for padding."""
        return (self.read([row]).segment_ids[0] - 1) // KINDS

    def _stream(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, whether each counts) of a document; the first is nobody's target."""
        count = int(self.corpus.table.num_tokens[document]) - 1
        inputs, targets, known = self.corpus.gather(*(np.array([n], np.int64) for n in (document, 0, count)))
        return np.append(inputs, targets[-1]), np.append(False, known)

    def _write(self, batch: Batch, row: int, at: int, place: int, number: int, kind: int) -> int:
        """Writes one document of a group from `at` on; returns the number of its inputs."""
        document, other = (int(field[number, kind]) for field in (self.groups.document, self.groups.prompt_of))
        if document < 0:
            return 0
        ids, counts = self._stream(document)
        if other != document:
            prompt, before = int(self.prompts[other]), int(self.prompts[document])
            ids = np.concatenate([self._stream(other)[0][:prompt], ids[before:]])
            counts = np.concatenate([np.zeros(prompt, bool), counts[before:]])
        drop = int(self.groups.drop[number, kind])
        ids, counts = ids[drop:], counts[drop:]
        n = len(ids) - 1
        part = slice(at, at + n)
        batch.tokens[row, part], batch.targets[row, part], batch.weights[row, part] = ids[:-1], ids[1:], counts[1:]
        batch.segment_ids[row, part], batch.positions[row, part] = KINDS * place + kind + 1, np.arange(n)
        return n


class PairDataset(StepBatches):
    """One split of prepared preferences, with the members of `lm.data.loader.TokenDataset` that a run uses.

    num_pairs: groups with both responses. num_cut: groups whose prompt lost its start. left_out: places of the groups
    whose responses do not fit a row (and with too_long="skip" of all that are too long).
    Raises ValueError where nothing fits, and with too_long="refuse" at anything that does not.
    """

    pairs, token_bytes, num_bytes, bytes_per_target = True, None, 0, 0.0

    def __init__(self, corpora: Corpora, options: DataOptions, *, split: str, seed: int, batch_size: int,
                 seq_len: int) -> None:
        (self.name, part), = getattr(corpora, split).items()
        self.tokenizer, self.split, self.batch_size, self.seq_len = corpora.tokenizer, split, batch_size, seq_len
        source = options.validation_part().get(self.name, options)
        table, places = read_pairs(source.path)
        record, kind, prompts = table
        # The partner in another prompt is the same at every evaluation and for every training seed.
        records, document, prompt_of = group(record, kind, part.documents, mismatched=options.mismatched,
                                             key=fold(options.split_seed))
        groups, cut, too_long = fit(records, document, prompt_of, part.corpus.table.num_tokens, prompts, seq_len)
        if options.too_long != "cut":
            too_long, whole = too_long | cut, groups.drop.sum(1) == 0
            groups, cut = Groups(*(field[whole] for field in groups)), np.zeros_like(cut)
        self.left_out = [places[number] for number in records[too_long]]
        self.num_cut = int(cut.sum())
        self._report([places[number] for number in records[cut]], options.too_long)
        if not len(groups.record):
            raise ValueError(f"no pair of the {split} split fits a row of {seq_len} tokens; raise train.seq_len")
        key = fold(seed, "")
        packing = FirstFit if options.packing == "first_fit" else Single
        plan = packing(groups.inputs, seq_len, key=key, window=options.packing_window, shuffle=options.shuffle)
        order = RowOrder(plan.row_bounds, key=key, shuffle=options.shuffle)
        self.reader = PairReader(part, groups, prompts, plan, order, seq_len)
        self._places = places
        self.num_rows_per_epoch = plan.num_rows
        self.num_documents, self.num_tokens = int((groups.document >= 0).sum()), int(groups.inputs.sum())
        self.num_targets = int(part.corpus.num_targets[groups.document[groups.document >= 0]].sum())
        self.num_pairs = int((groups.document[:, :2] >= 0).all(1).sum())
        self.packing_efficiency = self.num_tokens / (plan.num_rows * seq_len)
        self.fingerprint = digest(part.corpus.fingerprint, *groups, [
            split, seed, batch_size, seq_len, options.packing, options.packing_window, options.shuffle])

    def _report(self, cut: list[str], rule: str) -> None:
        """Says what did not fit and where it stands; raises ValueError where that is asked for."""
        if rule == "refuse" and self.left_out:
            raise ValueError(f"{self.left_out[0]} and {len(self.left_out) - 1} other pairs are longer than a row of "
                             f"{self.seq_len} tokens; raise train.seq_len, or set data.too_long='cut' or 'skip'")
        for what, where in (("lost the start of their prompt", cut), ("do not fit and are left out", self.left_out)):
            if where:
                log.warning("%s: %d of the pairs %s in rows of %d tokens: %s", self.split, len(where), what,
                            self.seq_len, first_of(where))

    def places(self, step: int) -> list[str]:
        """File and line of everything in batch `step`."""
        first = step * self.batch_size
        rows = (self.reader.order(number)[1] for number in range(first, first + self.batch_size))
        return [self._places[self.reader.groups.record[number]] for row in rows for number in self.reader.in_row(row)]

    def place(self, step: int, row: int, group: int) -> str:
        """File and line of a group of a row of batch `step`, counted over all processes."""
        return self.row_places(self.reader.order(step * self.batch_size + row)[1])[group]

    def row_places(self, row: int) -> list[str]:
        """File and line of everything in a row of the plan."""
        return [self._places[self.reader.groups.record[number]] for number in self.reader.in_row(row)]

    def eval_batches(self, limit: int | None = None, process_index: int = 0, process_count: int = 1
                     ) -> Iterator[Batch]:
        """Every row of the plan once, in order, or the first `limit` batches; the last is filled up with padding."""
        first, size = self.share(process_index, process_count)
        for number in range(self.num_eval_batches(limit)):
            begin = number * self.batch_size + first
            yield self.reader.read([row if row < self.num_rows_per_epoch else None
                                    for row in range(begin, begin + size)])

    def slices(self) -> dict[str, Any]:
        """None."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Counts of the split, as plain values."""
        return {"split": self.split, "pairs": self.num_pairs, "documents": self.num_documents,
                "tokens": self.num_tokens, "rows_per_epoch": self.num_rows_per_epoch, "cut_prompts": self.num_cut,
                "left_out": len(self.left_out), "packing_efficiency": round(self.packing_efficiency, 6),
                "vocab_size": self.tokenizer.vocab_size, "fingerprint": self.fingerprint, "sources": {}}


def read_pairs(path: Any) -> tuple[np.ndarray, list[str]]:
    """(pairs.npy, the lines of places.txt) of a prepared folder. Raises ValueError for a folder of another kind."""
    manifest, folder = read_manifest(path), epath.Path(path).expanduser()
    if "preference" not in manifest:
        raise ValueError(f"{path!r} holds no pairs; source={PAIRS!r} reads what `lm data prepare --kind preference` "
                         f"made")
    data = (folder / PAIRS_FILE).read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest["preference"]["sha256"]:
        raise ValueError(f"{folder / PAIRS_FILE} does not match its sha256 in the manifest; copy or prepare it again")
    places = (folder / PLACES_FILE).read_text(encoding="utf-8").splitlines()
    return np.load(io.BytesIO(data), allow_pickle=False), places
