"""Reads what `lm data prepare` wrote: tokens in array_record shards beside a manifest.

Layout of the folder: manifest.json, documents.npy (uint64 [4, N]: the columns of `DocumentTable`), shards
tokens-<n>.array_record, and tokenizer/<file> where the tokenizer has one. A record holds up to `record_tokens` tokens
of one document as unsigned little-endian integers; documents, and the records of each, follow each other over shards.

Chats (`lm data prepare --kind chat`) have beside that answers-<n>.array_record, with the same records as bits (which
tokens are to be learned), and chats.npy (int64 [3, N]: number of these tokens, their UTF-8 bytes, number of the group).
"""

import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from lm.data.corpus import Corpus, DocumentTable
from lm.data.hashing import digest
from lm.data.tokenizer import Tokenizer, build_tokenizer

FORMAT = "loomlm-tokens-1"
MASKED_FORMAT = "loomlm-chats-1"  # a name of its own: a reader that knows no masks would learn the prompts too
MANIFEST, DOCUMENTS, CHATS = "manifest.json", "documents.npy", "chats.npy"


def read_manifest(path: str | Sequence[str] | None) -> dict[str, Any]:
    """The manifest of a prepared folder. Raises ValueError where there is none or it is of another kind."""
    if not isinstance(path, str):
        raise ValueError(f"source='array_record' reads one folder made by `lm data prepare`; got path={path!r}; "
                         f"name several in data.sources")
    folder = epath.Path(path).expanduser()
    if not (folder / MANIFEST).exists():
        raise ValueError(f"no prepared data at {path!r} ({MANIFEST} is missing); make it with `lm data prepare "
                         f"--source ... --out {path}`")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / MANIFEST} is not JSON ({error}); prepare the data again") from None
    if manifest.get("format") not in (FORMAT, MASKED_FORMAT):
        raise ValueError(f"{folder / MANIFEST} has format {manifest.get('format')!r}, this version reads {FORMAT!r} "
                         f"and {MASKED_FORMAT!r}; prepare the data again")
    return manifest


def manifest_tokenizer(path: str | Sequence[str] | None) -> Tokenizer:
    """The tokenizer that a prepared folder was made with, from the copy kept in it."""
    spec = dict(read_manifest(path)["tokenizer"])
    if "path" in spec:
        spec["path"] = str(epath.Path(path).expanduser() / spec["path"])
    return build_tokenizer(spec, where=f"{path}/{MANIFEST}")


def _table(file: epath.Path, sha256: str) -> np.ndarray:
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{file} does not match its sha256 in {MANIFEST}; copy or prepare it again")
    return np.load(io.BytesIO(data), allow_pickle=False)


class PreparedCorpus(Corpus):
    """Documents of a prepared folder, read by record through grain."""

    def __init__(self, path: str, tokenizer: Tokenizer, *, add_bos: bool, add_eos: bool) -> None:
        import grain

        manifest, folder = read_manifest(path), epath.Path(path).expanduser()
        if manifest["tokenizer_fingerprint"] != tokenizer.fingerprint:
            raise ValueError(f"{path!r} was prepared with tokenizer {manifest['tokenizer']} (fingerprint "
                             f"{manifest['tokenizer_fingerprint']}), the config's is {type(tokenizer).__name__} "
                             f"({tokenizer.fingerprint}); leave data.tokenizer out, or prepare the data again")
        columns = _table(folder / DOCUMENTS, manifest["documents_sha256"])
        super().__init__(DocumentTable(*columns[:3].astype(np.int64), columns[3]), tokenizer, add_bos=add_bos,
                         add_eos=add_eos)
        def records(shards: Sequence[dict[str, Any]]) -> Any:
            for shard in shards:
                file = folder / shard["file"]
                if not file.exists() or file.stat().length != shard["bytes"]:
                    raise ValueError(f"{file} is missing or not the {shard['bytes']} bytes of {MANIFEST}; copy or "
                                     f"prepare it again")
            return grain.sources.ArrayRecordDataSource([str(folder / shard["file"]) for shard in shards])

        self._records, self._answers, self._groups = records(manifest["shards"]), None, None
        if manifest["format"] == MASKED_FORMAT:
            if add_bos or add_eos:
                raise ValueError(f"{path!r} holds chats, whose template wrote all special tokens; leave out "
                                 f"data.add_bos and data.add_eos")
            self._answers, self.whole = records(manifest["answers"]), True
            self.num_targets, self.target_bytes, self._groups = _table(folder / CHATS, manifest["chats_sha256"])
            self._names = manifest["chat"]["groups"]
            self.fingerprint = digest(self.fingerprint, [shard["sha256"] for shard in
                                                         (*manifest["shards"], *manifest["answers"])])
        self._dtype, self._size = np.dtype(manifest["dtype"]), int(manifest["record_tokens"])
        counts = -(-self.table.num_tokens // self._size)
        self._first = np.cumsum(counts) - counts

    def targets_before(self, document: int, start: int) -> int:
        if self._answers is None or start == 0:
            return start
        return int(self._read(self._answers, document, 1, start + 1).sum())

    def in_group(self, name: str) -> np.ndarray:
        """[N] bool: documents of that group. Raises ValueError where there is none of that name."""
        names = [] if self._groups is None else self._names
        if name not in names:
            raise ValueError(f"the prepared data has no group {name!r}; its groups are "
                             f"{', '.join(filter(None, names)) or 'none (lm data prepare --kind chat --group-by)'}")
        return self._groups == names.index(name)

    def _read(self, records: Any, document: int, start: int, stop: int) -> np.ndarray:
        """Elements start .. stop of a document: ids int32, or bool where `records` are those of answers."""
        begin, end = start // self._size, -(-stop // self._size)
        first = int(self._first[document])
        if records is self._answers:
            read = [np.unpackbits(np.frombuffer(records[first + i], np.uint8)).astype(bool) for i in range(begin, end)]
        else:
            read = [np.frombuffer(records[first + i], self._dtype).astype(np.int32) for i in range(begin, end)]
        return np.concatenate(read)[start - begin * self._size:stop - begin * self._size]

    def gather(self, document: np.ndarray, start: np.ndarray, length: np.ndarray
               ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        total = int(length.sum())
        inputs, targets = np.zeros(total, np.int32), np.zeros(total, np.int32)
        known, at, bos = np.ones(total, bool), 0, int(self.bos is not None)
        for doc, begin, count in zip(document.tolist(), start.tolist(), length.tolist(), strict=True):
            # One token more than the inputs: the target of the last one.
            stream = np.zeros(count + 1, np.int32)
            lead = int(bos and begin == 0)
            stop = min(begin + count + 1 - bos, int(self.table.num_tokens[doc]))
            have = self._read(self._records, doc, begin + lead - bos, stop)
            stream[:lead], stream[lead:lead + len(have)] = self.bos or 0, have
            if begin + count + 1 > self.inputs[doc]:
                stream[count] = self.eos or 0
                known[at + count - 1] = self.eos is not None
            if self._answers is not None:
                learned = self._read(self._answers, doc, begin + 1, stop)
                known[at:at + len(learned)] &= learned
            inputs[at:at + count], targets[at:at + count] = stream[:-1], stream[1:]
            at += count
        return inputs, targets, known
