"""Named finite lists of batches: the validation split of a run, and further text files."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from lm.core.batch import Batch
from lm.data.corpora import Corpora, load_corpora
from lm.data.loader import TokenDataset, build_dataset
from lm.data.options import DataOptions
from lm.data.tokenizer import Tokenizer

KINDS = {".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".parquet": "parquet"}  # by ending; anything else is text


class EvalSet(NamedTuple):
    """batches: called at each evaluation, gives the same finite list. token_bytes: [vocab] UTF-8 bytes that each target
    stands for, or None where bits per byte is not wanted."""

    batches: Callable[[], Iterable[Batch]]
    token_bytes: np.ndarray | None = None


def set_of(dataset: TokenDataset, batches: int | None = None, *, process_index: int = 0,
           process_count: int = 1) -> EvalSet:
    """Every row of a split once, or its first `batches` batches; of each batch the rows of this process."""
    return EvalSet(lambda: dataset.eval_batches(batches, process_index, process_count), dataset.token_bytes)


def load_text(path: str, options: DataOptions, tokenizer: Tokenizer, *, batch_size: int, seq_len: int) -> TokenDataset:
    """All documents of a text, JSONL or parquet file, folder or glob, packed as the run of `options` packs its own.

    Raises ValueError or FileNotFoundError for files that cannot be read.
    """
    kind = next((kind for ending, kind in KINDS.items() if path.lower().endswith(ending)), "text")
    given = DataOptions(source=kind, path=path, text_field=options.text_field, separator=options.separator,
                        validation_fraction=0.0, split_seed=options.split_seed, add_bos=options.add_bos,
                        add_eos=options.add_eos, packing=options.packing, shuffle=False)
    corpora = load_corpora(given, tokenizer)
    # All of it is evaluated, and none is trained on: a short text need not fill a row.
    whole = Corpora(train={}, validation=corpora.train, tokenizer=tokenizer)
    return build_dataset(given, split="validation", batch_size=batch_size, seq_len=seq_len, corpora=whole)
