"""Named finite lists of batches: the validation split of a run, and further text files."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from lm.core.batch import Batch
from lm.data.corpora import Corpora, load_corpora
from lm.data.files import find_files
from lm.data.loader import TokenDataset, build_dataset
from lm.data.options import DataOptions
from lm.data.tokenizer import Tokenizer

# By ending. Of a folder these are read, and a file that is named, or that a glob matches, is text if it ends otherwise.
KINDS = {".txt": "text", ".txt.gz": "text", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".parquet": "parquet"}


class EvalSet(NamedTuple):
    """batches: called at each evaluation, gives the same finite list. token_bytes: [vocab] UTF-8 bytes that each target
    stands for, or None where bits per byte is not wanted. places: of a set of pairs, names the groups of the row of
    that number, counted over all batches and processes."""

    batches: Callable[[], Iterable[Batch]]
    token_bytes: np.ndarray | None = None
    places: Callable[[int], list[str]] | None = None


def set_of(dataset: TokenDataset, batches: int | None = None, *, process_index: int = 0,
           process_count: int = 1) -> EvalSet:
    """Every row of a split once, or its first `batches` batches; of each batch the rows of this process."""
    return EvalSet(lambda: dataset.eval_batches(batches, process_index, process_count), dataset.token_bytes,
                   getattr(dataset, "row_places", None))


def kind_of(path: str) -> str:
    """The source that reads a file, folder or glob: text, jsonl or parquet, by the names of its files.

    Raises ValueError where nothing is there, and for files of several kinds, which no one source reads.
    """
    found: dict[str, str] = {}
    for file in find_files(path, tuple(KINDS)):
        kind = next((kind for ending, kind in KINDS.items() if file.name.lower().endswith(ending)), "text")
        found.setdefault(kind, file.name)
    if len(found) > 1:
        files = ", ".join(f"{name} ({kind})" for kind, name in found.items())
        raise ValueError(f"{path!r} holds files of several kinds: {files}; name those of one kind, with "
                         f"a glob such as '*.jsonl'")
    return next(iter(found))


def load_text(path: str, options: DataOptions, tokenizer: Tokenizer, *, batch_size: int, seq_len: int) -> TokenDataset:
    """All documents of a text, JSONL or parquet file, folder or glob, packed as the run of `options` packs its own.

    Raises ValueError or FileNotFoundError for files that cannot be read.
    """
    given = DataOptions(source=kind_of(path), path=path, text_field=options.text_field, separator=options.separator,
                        validation_fraction=0.0, split_seed=options.split_seed, add_bos=options.add_bos,
                        add_eos=options.add_eos, packing=options.packing, shuffle=False)
    corpora = load_corpora(given, tokenizer)
    # All of it is evaluated, and none is trained on: a short text need not fill a row.
    whole = Corpora(train={}, validation=corpora.train, tokenizer=tokenizer)
    return build_dataset(given, split="validation", batch_size=batch_size, seq_len=seq_len, corpora=whole)
