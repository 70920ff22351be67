"""Records with fields from jsonl and parquet files, one at a time, with the place that each came from."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lm.data.chat_template import BadChat
from lm.data.files import find_files, open_binary, read_lines
from lm.data.options import SourceOptions

KINDS = ("jsonl", "parquet")


def read_records(options: SourceOptions) -> Iterator[tuple[str, Mapping[str, Any] | BadChat]]:
    """(where, record) of every line or row, in order; a line that is no object is the fault that it has.

    where: `file:line` from 1, or `file row number` from 0. Raises ValueError for files that are absent or no text.
    """
    if options.kind not in KINDS:
        raise ValueError(f"chats and preferences are read from {' or '.join(KINDS)}; got source={options.kind!r}")
    paths = (options.path,) if isinstance(options.path, str) else options.path
    suffixes = (".jsonl", ".jsonl.gz") if options.kind == "jsonl" else (".parquet",)
    for path in paths:
        for file in find_files(path, suffixes, package=options.package):
            yield from (_lines(file) if options.kind == "jsonl" else _rows(file))


def _lines(file: Any) -> Iterator[tuple[str, Mapping[str, Any] | BadChat]]:
    for number, line in read_lines(file):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            record = BadChat("no JSON", f"the line is not JSON ({error.msg} at column {error.colno})")
        if not isinstance(record, (Mapping, BadChat)):
            record = BadChat("no object", f"the line holds {type(record).__name__}, not an object with fields")
        yield f"{file}:{number}", record


def _rows(file: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("source='parquet' needs pyarrow; pip install 'loomlm[data]'") from None
    with open_binary(file) as opened:
        try:
            table = pyarrow.parquet.ParquetFile(opened)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{file} is not a parquet file ({str(error).splitlines()[0]})") from None
        row = 0
        for block in table.iter_batches(batch_size=1024):
            for record in block.to_pylist():
                yield f"{file} row {row}", record
                row += 1
