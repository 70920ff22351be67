"""From options to tokenised documents, divided into training and validation."""

import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lm.data.corpus import Corpus, MemoryCorpus
from lm.data.encoding import encode_documents
from lm.data.options import PREPARED, DataOptions, SourceOptions, data_options
from lm.data.prepared import PreparedCorpus, manifest_tokenizer, read_manifest
from lm.data.sources import read_documents
from lm.data.split import DEFAULT_FRACTION, validation_mask
from lm.data.synthetic.base import Task
from lm.data.synthetic.ids import Ids
from lm.data.teacher import Teacher
from lm.data.tokenizer import Tokenizer, build_tokenizer

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """Some documents of a corpus, and the weight of the source in its mixture."""

    corpus: Corpus
    documents: np.ndarray  # int64, numbers of documents in the corpus
    weight: float


class Corpora(NamedTuple):
    """Everything that was read, by name of the source; `tokenizer` is the one it was read with. Made rows are a task in
    the place of a part."""

    train: Mapping[str, Part | Task]
    validation: Mapping[str, Part | Task]
    tokenizer: Tokenizer


def load_tokenizer(options: DataOptions | Mapping) -> Tokenizer:
    """The tokenizer of a data group: the one it names, else the one its prepared data was made with, else bytes."""
    options = data_options(options)
    if not options.sources and (task := options.build_task()) is not None:
        return Ids(task.vocab_size)
    if options.tokenizer is None:
        for part in options.parts().values():
            if part.kind in PREPARED:
                return manifest_tokenizer(part.path)
    return build_tokenizer(options.tokenizer)


def _fraction(options: DataOptions, source: SourceOptions, name: str) -> float:
    """The share held out of a source; prepared data may bring its own, which the config must not contradict."""
    given = options.validation_fraction
    if source.kind in PREPARED:
        manifest = read_manifest(source.path)
        fixed = manifest["validation_fraction"]
        if fixed is not None:
            if (given is not None and given != fixed) or options.split_seed != manifest["split_seed"]:
                raise ValueError(f"source {name!r} was prepared with validation_fraction={fixed}, split_seed="
                                 f"{manifest['split_seed']}; the config has {given} and {options.split_seed}; leave "
                                 f"them out, or prepare the data again")
            return fixed
    return DEFAULT_FRACTION if given is None else given


def _load(name: str, source: SourceOptions, options: DataOptions, tokenizer: Tokenizer) -> Corpus:
    special = {"add_bos": options.add_bos, "add_eos": options.add_eos}
    if source.kind in PREPARED:
        corpus = PreparedCorpus(source.path, tokenizer, **special)
        corpus.teacher = None if source.teacher is None else Teacher(source.teacher, corpus)
        return corpus
    advice = f"`lm data prepare --source {source.kind}` tokenizes {name!r} once for all runs"
    corpus = MemoryCorpus(encode_documents(read_documents(source), tokenizer, advice=advice), tokenizer, **special)
    log.info("%s: %d documents, %d tokens, %d bytes", name, len(corpus.inputs), corpus.streams.sum(),
             corpus.table.num_bytes.sum())
    return corpus


def usable_documents(corpus: Corpus, source: SourceOptions) -> np.ndarray:
    """Numbers of the documents that hold something, and are of the group that the source names."""
    usable = corpus.table.num_tokens > 0
    return np.flatnonzero(usable & corpus.in_group(source.group) if source.group is not None else usable)


def weigh_documents(parts: list[Part]) -> None:
    """Makes every training document count the same: its tokens get the weight mean targets / targets of it. (Documents
    held out of the same corpus get such weights too; what is evaluated weighs as what is trained.)"""
    counts = np.concatenate([part.corpus.num_targets[part.documents] for part in parts])
    mean = counts[counts > 0].mean()
    for part in parts:
        part.corpus.weights = (mean / np.maximum(part.corpus.num_targets, 1)).astype(np.float32)


def load_corpora(options: DataOptions | Mapping, tokenizer: Tokenizer | None = None) -> Corpora:
    """Reads, tokenises and divides every source once; hand the result to `build_dataset` for each split."""
    options = data_options(options)
    tokenizer = load_tokenizer(options) if tokenizer is None else tokenizer
    separate = options.validation_part()
    if not options.sources and (task := options.build_task()) is not None:
        held = [source.build_task("config.data.validation") for source in separate.values()] or [task]
        return Corpora({options.kind: task}, {} if options.validation_fraction == 0 else {options.kind: held[0]},
                       tokenizer)
    train, validation = {}, {}
    # By name: a config that went through JSON may have lost the order in which its sources were written.
    for name, source in sorted(options.parts().items()):
        corpus = _load(name, source, options, tokenizer)
        # Documents that tokenise to nothing in prepared data have no row to stand in.
        usable = usable_documents(corpus, source)
        fraction = 0.0 if separate else _fraction(options, source, name)
        try:
            held = validation_mask(corpus.table.content[usable], fraction, options.split_seed)
        except ValueError as error:
            raise ValueError(f"source {name!r}: {error}") from None
        train[name] = Part(corpus, usable[~held], source.weight)
        if held.any():
            validation[name] = Part(corpus, usable[held], source.weight)
    for name, source in separate.items():
        corpus = _load(name, source, options, tokenizer)
        validation[name] = Part(corpus, usable_documents(corpus, source), source.weight)
    if options.weigh == "documents":
        weigh_documents([*train.values()])
    return Corpora(train, validation, tokenizer)
