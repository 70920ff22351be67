"""Tokenised documents with random access.

A document's stream is [bos] + tokens + [eos], each special where asked for. Its inputs are the stream without the eos,
its targets the stream from the second token on: eos is predicted and never read.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lm.data.encoding import Encoded
from lm.data.hashing import digest
from lm.data.tokenizer import Tokenizer


class DocumentTable(NamedTuple):
    """What is known of each document without reading it, each field [N]."""

    num_tokens: np.ndarray  # int64, without bos and eos
    num_bytes: np.ndarray  # int64, of UTF-8 text
    token_bytes: np.ndarray  # int64, sum of the tokenizer's token_bytes
    content: np.ndarray  # uint64, hash of the text


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned little-endian type for the ids of a vocabulary."""
    return np.dtype("u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


class Corpus:
    """Documents of one source. Subclasses read; this holds what plans and accounts are made from.

    inputs, streams: [N] int64, tokens that a document feeds to the model, and those plus eos.
    num_targets: [N] int64, tokens of a document that are to be learned. target_bytes: [N] int64, UTF-8 bytes of these.
    weights: [N] float32 that multiplies the loss weights of a document, or None for 1.
    whole: whether a document that is cut is of no use. teacher: predictions for every target, or None.
    """

    weights: np.ndarray | None = None
    whole = False
    teacher: Any = None

    def __init__(self, table: DocumentTable, tokenizer: Tokenizer, *, add_bos: bool, add_eos: bool) -> None:
        for wanted, name in ((add_bos, "bos"), (add_eos, "eos")):
            if wanted and getattr(tokenizer, f"{name}_id") is None:
                how = "dict(kind='bytes', {0}_id=256)" if type(tokenizer).__name__ == "Bytes" else "its {0} option"
                raise ValueError(f"data.add_{name} needs a tokenizer that knows {name}; set data.tokenizer with "
                                 f"{how.format(name)}, or data.add_{name}=False")
        self.table = table
        self.bos = tokenizer.bos_id if add_bos else None
        self.eos = tokenizer.eos_id if add_eos else None
        self.inputs = table.num_tokens + int(add_bos)
        self.streams = self.inputs + int(add_eos)
        self.num_targets, self.target_bytes = self.streams - 1, table.num_bytes
        self.fingerprint = digest(table.content, table.num_tokens, tokenizer.fingerprint, self.bos, self.eos)

    def gather(self, document: np.ndarray, start: np.ndarray, length: np.ndarray
               ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(inputs, targets, whether the target exists and is to be learned), each [sum(length)], of pieces one after
        the other."""
        raise AssertionError(f"{type(self).__name__} does not say how its tokens are read")

    def targets_before(self, document: int, start: int) -> int:
        """How many targets of a document come before that of its input `start`."""
        return start

    def blocks(self, documents: np.ndarray, size: int = 1 << 20) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(inputs, targets) of every target of the documents, at most `size` at a time."""
        ends = np.cumsum(self.inputs[documents])
        for begin in range(0, int(ends[-1]) if len(ends) else 0, size):
            end = min(begin + size, int(ends[-1]))
            first, last = np.searchsorted(ends, begin, "right"), np.searchsorted(ends, end, "left") + 1
            before = ends[first:last] - self.inputs[documents[first:last]]
            start = np.maximum(before, begin)
            inputs, targets, known = self.gather(documents[first:last], start - before,
                                                 np.minimum(ends[first:last], end) - start)
            yield inputs[known], targets[known]


class MemoryCorpus(Corpus):
    """All streams in one array."""

    def __init__(self, documents: Iterable[Encoded], tokenizer: Tokenizer, *, add_bos: bool, add_eos: bool) -> None:
        dtype, sizes = token_dtype(tokenizer.vocab_size), tokenizer.token_bytes
        head = [np.array([tokenizer.bos_id], dtype)] if add_bos and tokenizer.bos_id is not None else []
        tail = [np.array([tokenizer.eos_id], dtype)] if add_eos and tokenizer.eos_id is not None else []
        arrays, rows = [], []
        for ids, num_bytes, content, *_ in documents:
            if len(ids):
                arrays += [*head, ids.astype(dtype, copy=False), *tail]
                rows.append((len(ids), num_bytes, int(sizes[ids].sum()), content))
        super().__init__(document_table(rows), tokenizer, add_bos=add_bos, add_eos=add_eos)
        # One spare token: the target of the very last input is then in bounds, though never used.
        self._flat = np.concatenate([*arrays, np.zeros(1, dtype)])
        self._offsets = np.cumsum(self.streams) - self.streams

    def gather(self, document: np.ndarray, start: np.ndarray, length: np.ndarray
               ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ends = np.cumsum(length)
        at = np.arange(ends[-1]) + np.repeat(self._offsets[document] + start - (ends - length), length)
        last = start + length == self.streams[document]
        known = np.ones(len(at), bool)
        known[ends[last] - 1] = False
        return self._flat[at].astype(np.int32), self._flat[at + 1].astype(np.int32), known


def document_table(rows: list[tuple[int, int, int, int]]) -> DocumentTable:
    """The table from one (tokens, bytes, token bytes, content) a document."""
    columns = zip(*rows, strict=True) if rows else ((),) * 4
    types = (np.int64, np.int64, np.int64, np.uint64)
    return DocumentTable(*(np.array(column, dtype) for column, dtype in zip(columns, types, strict=True)))
