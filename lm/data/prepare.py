"""Writes a prepared folder (see `lm.data.prepared` for its layout): tokenise once, read by record ever after."""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from etils import epath

from lm.data.corpus import document_table, token_dtype
from lm.data.encoding import Encoded, encode_documents
from lm.data.hashing import digest
from lm.data.options import SourceOptions
from lm.data.prepared import CHATS, DOCUMENTS, FORMAT, MANIFEST, MASKED_FORMAT
from lm.data.sources import read_documents
from lm.data.split import validation_mask
from lm.data.tokenizer import Tokenizer, tokenizer_spec

RECORD_TOKENS = 8192
SHARD_TOKENS = 1 << 28


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Shards:
    """Writes records to one array_record file after another; each is closed when it holds `shard_tokens`."""

    def __init__(self, folder: pathlib.Path, shard_tokens: int, name: str = "tokens") -> None:
        self._folder, self._most, self._name = folder, shard_tokens, name
        self._writer, self._tokens, self._records = None, 0, 0
        self.shards: list[dict[str, Any]] = []

    def write(self, ids: np.ndarray, record_tokens: int) -> None:
        """ids: of one document; bool is written as bits."""
        from array_record.python import array_record_module

        if self._writer is None:
            self._path = self._folder / f"{self._name}-{len(self.shards):05d}.array_record"
            # group_size 1: a record is read without its neighbours, which is what random access wants.
            self._writer = array_record_module.ArrayRecordWriter(str(self._path), "group_size:1")
        for begin in range(0, len(ids), record_tokens):
            record = ids[begin:begin + record_tokens]
            self._writer.write((np.packbits(record) if record.dtype == bool else record).tobytes())
            self._records += 1
        self._tokens += len(ids)
        if self._tokens >= self._most:
            self.close()

    def close(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self.shards.append({"file": self._path.name, "records": self._records, "tokens": self._tokens,
                            "bytes": self._path.stat().st_size, "sha256": _sha256(self._path)})
        self._writer, self._tokens, self._records = None, 0, 0


def _fill(folder: pathlib.Path, documents: Iterable[Encoded], tokenizer: Tokenizer, *,
          validation_fraction: float | None, split_seed: int, shard_tokens: int, record_tokens: int,
          notes: Callable[[pathlib.Path], dict[str, Any]]) -> dict[str, Any]:
    dtype, sizes, rows, chats = token_dtype(tokenizer.vocab_size), tokenizer.token_bytes, [], []
    shards, masks = _Shards(folder, shard_tokens), _Shards(folder, shard_tokens, "answers")
    try:
        for ids, num_bytes, content, response, group in documents:
            if len(ids):
                rows.append((len(ids), num_bytes, int(sizes[ids].sum()), content))
                shards.write(ids.astype(dtype, copy=False), record_tokens)
                if response is not None:
                    # The first token is nobody's target.
                    chats.append((int(response[1:].sum()), int(sizes[ids[1:]][response[1:]].sum()), group))
                    masks.write(response, record_tokens)
    finally:
        shards.close()
        masks.close()
    table = document_table(rows)
    if validation_fraction is not None:
        held = validation_mask(table.content, validation_fraction, split_seed)
    np.save(folder / DOCUMENTS, np.stack([column.astype(np.uint64) for column in table]), allow_pickle=False)
    spec = tokenizer_spec(tokenizer)
    if "path" in spec:
        # A copy, so that the folder goes on working without the package or file that it came from.
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / tokenizer.file.name).write_bytes(tokenizer.file.read_bytes())
        spec = {key: value for key, value in spec.items() if key != "package"}
        spec["path"] = f"tokenizer/{tokenizer.file.name}"
    if chats:
        np.save(folder / CHATS, np.array(chats, np.int64).T, allow_pickle=False)
    manifest = {
        "format": MASKED_FORMAT if chats else FORMAT, "num_documents": len(rows),
        "num_tokens": int(table.num_tokens.sum()),
        "num_bytes": int(table.num_bytes.sum()), "dtype": dtype.str, "record_tokens": record_tokens,
        "vocab_size": tokenizer.vocab_size, "tokenizer": spec, "tokenizer_fingerprint": tokenizer.fingerprint,
        "content_fingerprint": digest(table.content, table.num_tokens),
        "validation_fraction": validation_fraction, "split_seed": split_seed,
        "validation_documents": None if validation_fraction is None else int(held.sum()),
        "documents_sha256": _sha256(folder / DOCUMENTS), "shards": shards.shards,
        "versions": {"python": platform.python_version(), "numpy": np.__version__,
                     "array_record": importlib.metadata.version("array_record")},
        **({"answers": masks.shards, "num_targets": sum(row[0] for row in chats),
            "chats_sha256": _sha256(folder / CHATS)} if chats else {}),
        **notes(folder),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def prepare(source: SourceOptions, tokenizer: Tokenizer, out: str, *, workers: int = 0, **layout: Any
            ) -> dict[str, Any]:
    """Tokenises a source into the new folder `out` (local or gs://) and returns the manifest.

    The result depends on the documents and the tokenizer, not on `workers` (processes). layout: see `write_prepared`.
    """
    return write_prepared(encode_documents(read_documents(source), tokenizer, workers=workers), tokenizer, out,
                          **layout)


def write_prepared(documents: Iterable[Encoded], tokenizer: Tokenizer, out: str, *,
                   validation_fraction: float | None = None, split_seed: int = 0, shard_tokens: int = SHARD_TOKENS,
                   record_tokens: int = RECORD_TOKENS,
                   notes: Callable[[pathlib.Path], dict[str, Any]] = lambda folder: {}) -> dict[str, Any]:
    """Writes documents, all of which or none have a mask of answers, into the new folder `out`; returns the manifest.

    A local folder appears whole, by a rename; in a bucket the manifest is written last, and a folder without one is not
    read. `validation_fraction`, where given, fixes the split for every reader. notes: called when all documents are
    written; may add files to the folder, and returns what the manifest is to hold beside the rest. Raises ValueError
    where `out` exists.
    """
    final = epath.Path(out).expanduser()
    if final.exists():
        raise ValueError(f"{out!r} exists; prepared data is never overwritten: choose another --out, or remove it")
    remote = "://" in str(out)
    if not remote:
        file = next((place for place in final.parents if place.exists() and not place.is_dir()), None)
        if file is not None:
            raise ValueError(f"--out {out}: {file} is a file; choose a folder that is new, in one that may exist")
        final.parent.mkdir(parents=True, exist_ok=True)
    beside = None if remote else str(final.parent)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=beside))
    try:
        manifest = _fill(folder, documents, tokenizer, validation_fraction=validation_fraction, split_seed=split_seed,
                         shard_tokens=shard_tokens, record_tokens=record_tokens, notes=notes)
        if remote:
            upload(folder, final)
        else:
            folder.chmod(0o755)  # mkdtemp makes it private
            try:
                os.rename(folder, final)
            except OSError as error:
                raise ValueError(f"{out!r} appeared while preparing ({error.strerror}); choose another --out") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def upload(folder: pathlib.Path, final: epath.Path) -> None:
    """Copies a finished folder file by file, the manifest last: without it the folder is not read."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST]
    for file in [*files, folder / MANIFEST]:
        target = final / file.relative_to(folder).as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        epath.Path(file).copy(target)
