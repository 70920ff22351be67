"""Prepared data equals the text it was made from, whatever the workers and shards."""

import json

import numpy as np
import pytest
from etils import epath

from lm.data.corpora import load_tokenizer
from lm.data.loader import build_dataset
from lm.data.options import SourceOptions
from lm.data.prepare import prepare, upload
from lm.data.tokenizer import build_tokenizer

TEXTS = tuple("".join(chr(97 + (i * 5 + j * j) % 26) for j in range(1 + (i * 53) % 200)) + "é" for i in range(40))
SOURCE = SourceOptions(source="memory", texts=TEXTS)
TOKENIZER = build_tokenizer({"kind": "bytes", "bos_id": 256, "eos_id": 257})


def batches(data, tokenizer=None, steps=12, split="train", **fields):
    made = build_dataset({**data, **fields}, tokenizer=tokenizer, split=split, batch_size=3, seq_len=24, seed=5)
    return made, [made.batch(step) for step in range(steps)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "tokens"
    prepare(SOURCE, TOKENIZER, str(out), shard_tokens=1000, record_tokens=32)
    return out


@pytest.mark.parametrize("special", [{}, {"add_bos": True}, {"add_eos": True}, {"add_bos": True, "add_eos": True}])
@pytest.mark.parametrize("packing", ["first_fit", "concat"])
def test_prepared_batches_equal_those_made_from_text(folder, special, packing):
    fields = {"packing": packing, "validation_fraction": 0.2, **special}
    for split in ("train", "validation"):
        a, left = batches({"source": "memory", "texts": TEXTS}, TOKENIZER, split=split, **fields)
        b, right = batches({"source": "array_record", "path": str(folder)}, split=split, **fields)
        assert a.fingerprint == b.fingerprint
        for x, y in zip(left, right, strict=True):
            for f, g in zip(x, y, strict=True):
                np.testing.assert_array_equal(f, g)
        pairs = [sorted(map(tuple, np.concatenate([np.stack(p, 1) for p in d.target_blocks()]).tolist()))
                 for d in (a, b)]
        assert pairs[0] == pairs[1]


def test_manifest_counts_and_hashes(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["num_documents"] == 40
    assert manifest["num_tokens"] == manifest["num_bytes"] == sum(len(t.encode()) for t in TEXTS)
    assert len(manifest["shards"]) > 2 and manifest["tokenizer"]["kind"] == "bytes"
    import hashlib
    for shard in manifest["shards"]:
        assert hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]


def test_files_are_identical_for_any_number_of_workers(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("lm.data.encoding._BLOCK_CHARS", 100)  # many blocks, so that workers overtake each other
    prepare(SOURCE, TOKENIZER, str(tmp_path / "two"), workers=2, shard_tokens=1000, record_tokens=32)
    for file in sorted(folder.iterdir()):
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes(), file.name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["two"]


def test_tokenizer_file_travels_with_the_tokens(tmp_path):
    import base64
    ranks = tmp_path / "small.tiktoken"
    ranks.write_bytes(b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)))
    tokenizer = build_tokenizer({"kind": "tiktoken", "path": str(ranks)})
    prepare(SOURCE, tokenizer, str(tmp_path / "out"))
    ranks.unlink()
    data = {"source": "array_record", "path": str(tmp_path / "out")}
    assert load_tokenizer(data).fingerprint == tokenizer.fingerprint
    assert batches(data)[0].num_bytes > 0


def test_another_tokenizer_is_refused(folder):
    with pytest.raises(ValueError, match="was prepared with tokenizer"):
        batches({"source": "array_record", "path": str(folder), "tokenizer": "bytes"})


def test_an_existing_folder_is_never_overwritten_and_a_failure_leaves_nothing(tmp_path, folder):
    with pytest.raises(ValueError, match="exists; prepared data is never overwritten"):
        prepare(SOURCE, TOKENIZER, str(folder))
    with pytest.raises(ValueError, match="no file or folder"):
        prepare(SourceOptions(source="text", path=str(tmp_path / "none")), TOKENIZER, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_inside_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"file/in/web: .*file is a file; choose a folder"):
        prepare(SOURCE, TOKENIZER, str(tmp_path / "file" / "in" / "web"))


def test_damage_is_found_before_training(tmp_path, folder):
    import shutil
    for name, change, message in (("manifest.json", None, "manifest.json is missing"),
                                  ("documents.npy", b"x", "does not match its sha256"),
                                  ("tokens-00001.array_record", b"x", "is missing or not the"),
                                  ("tokens-00000.array_record", None, "is missing or not the")):
        copy = tmp_path / f"copy-{name}-{change is None}"
        shutil.copytree(folder, copy)
        if change is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(change)
        with pytest.raises(ValueError, match=message):
            batches({"source": "array_record", "path": str(copy)})


def test_a_split_fixed_when_preparing_is_what_readers_get(tmp_path):
    out = str(tmp_path / "out")
    manifest = prepare(SOURCE, TOKENIZER, out, validation_fraction=0.3, split_seed=4)
    data = {"source": "array_record", "path": out, "split_seed": 4}
    assert batches(data, split="validation")[0].num_documents == manifest["validation_documents"] > 5
    with pytest.raises(ValueError, match=r"was prepared with validation_fraction=0\.3, split_seed=4"):
        batches({**data, "split_seed": 0})
    with pytest.raises(ValueError, match="was prepared with validation_fraction"):
        batches({**data, "validation_fraction": 0.1})


def test_upload_writes_the_manifest_last(tmp_path, folder, monkeypatch):
    order = []
    copy = type(epath.Path(folder)).copy
    monkeypatch.setattr(type(epath.Path(folder)), "copy", lambda self, to: (order.append(self.name), copy(self, to)))
    upload(folder, epath.Path(tmp_path / "bucket"))
    assert order[-1] == "manifest.json" and len(order) == len(list(folder.iterdir()))
    batches({"source": "array_record", "path": str(tmp_path / "bucket")})
