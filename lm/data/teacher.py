"""A teacher's predictions on disk: its most probable tokens at every target of a prepared folder.

Layout of the folder: manifest.json; ids.npy, [targets, k] unsigned; logp.npy, [targets, k + 1] float32, the teacher's
log-probabilities at its temperature of these tokens and, last, of all others together. Targets follow each other as the
documents of the folder do, those of weight 0 left out.
"""

import json
import pathlib
from typing import Any

import numpy as np

from lm.data.corpus import Corpus, token_dtype
from lm.data.hashing import digest

FORMAT = "loomlm-teacher-1"
MANIFEST, IDS, LOGP = "manifest.json", "ids.npy", "logp.npy"


def create(folder: pathlib.Path, corpus: Corpus, k: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Empty (ids, logp) of every target of the corpus, in files of the new folder, to be filled and flushed."""
    folder.mkdir(parents=True)
    count = int(corpus.num_targets.sum())
    make = lambda name, width, dtype: np.lib.format.open_memmap(folder / name, "w+", dtype, (count, width))
    return make(IDS, k, token_dtype(vocab_size)), make(LOGP, k + 1, np.dtype("<f4"))


def finish(folder: pathlib.Path, corpus: Corpus, k: int, temperature: float, **notes: Any) -> None:
    """Writes the manifest, without which the folder is not read."""
    manifest = {"format": FORMAT, "k": k, "temperature": temperature, "data": corpus.fingerprint,
                "num_targets": int(corpus.num_targets.sum()), **notes}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


class Teacher:
    """Predictions for the targets of one corpus, read from disk as they are asked for.

    Raises ValueError for a folder that holds none, or those of other data.
    """

    def __init__(self, path: str, corpus: Corpus) -> None:
        folder = pathlib.Path(path).expanduser()
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"no predictions of a teacher at {path!r} ({MANIFEST} is missing); make them with "
                             f"`lm distill --workdir TEACHER --data PREPARED --out {path}`")
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{folder / MANIFEST} has format {manifest.get('format')!r}, this version reads "
                             f"{FORMAT!r}; make the predictions again")
        if manifest["data"] != corpus.fingerprint:
            raise ValueError(f"the predictions in {path!r} are for other data (fingerprint {manifest['data']}, the "
                             f"source's is {corpus.fingerprint}): other documents, tokenizer, add_bos or add_eos; make "
                             f"them again with `lm distill`")
        self.k, self.temperature = int(manifest["k"]), float(manifest["temperature"])
        self.fingerprint = digest(manifest)
        self._ids, self._logp = (np.load(folder / name, mmap_mode="r") for name in (IDS, LOGP))
        self._corpus, self._first = corpus, np.cumsum(corpus.num_targets) - corpus.num_targets

    def rows(self, document: int, start: int, count: int) -> slice:
        """Where the predictions for `count` targets of a document lie, from its input `start` on."""
        begin = int(self._first[document]) + self._corpus.targets_before(document, start)
        return slice(begin, begin + count)

    def gather(self, document: np.ndarray, start: np.ndarray, length: np.ndarray, known: np.ndarray
               ) -> tuple[np.ndarray, np.ndarray]:
        """(ids [sum(length), k], logp [sum(length), k + 1]) of pieces one after the other, uniform where not `known`.
        """
        ids = np.zeros((len(known), self.k), np.int32)
        logp = np.full((len(known), self.k + 1), -np.log(self.k + 1), np.float32)
        at = 0
        for doc, begin, size in zip(document.tolist(), start.tolist(), length.tolist(), strict=True):
            inside = at + np.flatnonzero(known[at:at + size])
            where = self.rows(doc, begin, len(inside))
            ids[inside], logp[inside] = self._ids[where], self._logp[where]
            at += size
        return ids, logp
