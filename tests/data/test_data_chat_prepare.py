"""Prepared chats: rows give weight to answers alone, and every row of the file is kept or accounted for."""

import json

import numpy as np
import pytest

from launch import cli
from lm.data.chat import render
from lm.data.chat_template import load_template
from lm.data.corpora import load_corpora
from lm.data.loader import build_dataset
from lm.data.prepared import manifest_tokenizer

RECORDS = [{"messages": [{"role": "user", "content": f"question {i}" + "?" * (i % 5)},
                         {"role": "assistant", "content": f"answer {i * i}"},
                         *([{"role": "user", "content": "sure?"}, {"role": "assistant", "content": "y" * i}]
                           if i % 3 else [])], "teacher": "big" if i % 4 == 0 else "small"} for i in range(1, 41)]
SPEC = '{"kind": "bytes", "eos_id": 256}'


def prepare(capsys, *argv):
    code = cli.main(["data", "prepare", "--kind", "chat", "--tokenizer", SPEC, "--template", "plain",
                     *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return path


def dataset(folder, seq_len=160, batch_size=3, **fields):
    return build_dataset({"source": "array_record", "path": str(folder), "validation_fraction": 0.0, **fields},
                         batch_size=batch_size, seq_len=seq_len, seed=3)


def documents(batch):
    """(tokens, weights, targets) of every document of a batch."""
    for row in range(len(batch.tokens)):
        for number in range(1, batch.segment_ids[row].max() + 1):
            inside = batch.segment_ids[row] == number
            yield batch.tokens[row][inside], batch.weights[row][inside], batch.targets[row][inside]


@pytest.mark.parametrize("packing", ["first_fit", "single"])
def test_packed_rows_weigh_the_answers_of_every_chat(tmp_path, lines, capsys, packing):
    code, printed, _ = prepare(capsys, "--source", "jsonl", "--path", lines, "--out", tmp_path / "out")
    assert code == 0 and "40 rows: 40 kept" in printed
    made = dataset(tmp_path / "out", packing=packing)
    tokenizer = manifest_tokenizer(str(tmp_path / "out"))
    template = load_template("plain", tokenizer)
    want = {tuple(ids): response for ids, response in (render(r["messages"], template, tokenizer) for r in RECORDS)}
    seen = set()
    for step in range(-(-made.num_rows_per_epoch // 3)):
        for tokens, weights, targets in documents(made.batch(step)):
            response = want[tuple(tokens)]
            # The weight of an input is that of the token that follows it, and the last has none.
            np.testing.assert_array_equal(weights, np.append(response[1:], False).astype(np.float32))
            np.testing.assert_array_equal(targets[:-1][response[1:]], tokens[1:][response[1:]])
            seen.add(tuple(tokens))
    assert seen == set(want)
    assert made.num_targets == sum(response[1:].sum() for response in want.values())
    answers = sum(len(m["content"]) for r in RECORDS for m in r["messages"] if m["role"] == "assistant")
    assert made.bytes_per_target == pytest.approx(answers / made.num_targets)
    inputs, _ = zip(*made.target_blocks(), strict=True)
    assert sum(map(len, inputs)) == made.num_targets  # the bigram sees what the model is evaluated on


def test_records_of_several_parts_and_cut_rows_keep_the_mask(tmp_path, lines, capsys, monkeypatch):
    monkeypatch.setattr("lm.data.prepare.RECORD_TOKENS", 16)
    import lm.data.prepare
    monkeypatch.setitem(lm.data.prepare.write_prepared.__kwdefaults__, "record_tokens", 16)
    prepare(capsys, "--source", "jsonl", "--path", lines, "--out", tmp_path / "small")
    monkeypatch.undo()
    prepare(capsys, "--source", "jsonl", "--path", lines, "--out", tmp_path / "large")
    assert json.loads((tmp_path / "small/manifest.json").read_text())["record_tokens"] == 16
    for fields in ({}, {"packing": "concat", "seq_len": 21}):
        left, right = (dataset(tmp_path / name, **fields).batch(1) for name in ("small", "large"))
        for a, b in zip(left, right, strict=True):
            np.testing.assert_array_equal(a, b)
        assert 0 < left.weights.sum() < left.present.sum()


def test_every_bad_row_is_counted_with_its_line(tmp_path, lines, capsys):
    bad = ['{"messages": [', "3", json.dumps({"text": "x"}),
           json.dumps({"messages": [{"role": "narrator", "content": "x"}]}),
           json.dumps({"prompt": "a", "completion": ""}), json.dumps({"prompt": "a", "completion": "x" * 400})]
    mixed = lines.read_text().splitlines()
    mixed[5:5] = bad
    lines.write_text("\n".join(mixed) + "\n")
    code, printed, _ = prepare(capsys, "--source", "jsonl", "--path", lines, "--out", tmp_path / "out",
                               "--max-tokens", 300)
    assert code == 0 and "46 rows: 40 kept (0 of them cut), 6 left out" in printed
    faults = [json.loads(line) for line in (tmp_path / "out/bad_rows.jsonl").read_text().splitlines()]
    assert [f["where"] for f in faults] == [f"{lines}:{n}" for n in range(6, 12)]
    assert [f["reason"] for f in faults] == ["no JSON", "no object", "fields missing", "unknown role", "empty answer",
                                             "too long"]
    for fault in faults:
        assert f"{fault['reason']}: 1, at {fault['where']}; the first: " in printed
    assert json.loads((tmp_path / "out/manifest.json").read_text())["chat"]["left_out"]["unknown role"] == 1
    code, _, err = prepare(capsys, "--source", "jsonl", "--path", lines, "--out", tmp_path / "strict", "--bad-rows",
                           "refuse")
    assert code == 2 and f"{lines}:6: the line is not JSON" in err and not (tmp_path / "strict").exists()


def test_a_file_without_one_good_row_leaves_no_folder(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"text": 1}\n')
    code, _, err = prepare(capsys, "--source", "jsonl", "--path", tmp_path / "x.jsonl", "--out", tmp_path / "out")
    assert code == 2 and "no row can be used" in err and "fields missing: 1" in err and not (tmp_path / "out").exists()


def test_parquet_gives_the_same_folder_as_jsonl(tmp_path, lines, capsys):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "chats.parquet")
    prepare(capsys, "--source", "jsonl", "--path", lines, "--out", tmp_path / "a")
    prepare(capsys, "--source", "parquet", "--path", tmp_path / "chats.parquet", "--out", tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes(), file.name


def test_rows_that_would_cut_a_chat_are_refused(tmp_path, lines, capsys):
    prepare(capsys, "--source", "jsonl", "--path", lines, "--out", tmp_path / "out")
    with pytest.raises(ValueError, match=r"chats are longer than seq_len 40 .*--max-tokens 40"):
        dataset(tmp_path / "out", seq_len=40)
    assert dataset(tmp_path / "out", seq_len=40, packing="concat").num_rows_per_epoch > 1
    with pytest.raises(ValueError, match="holds chats, whose template wrote all special tokens"):
        dataset(tmp_path / "out", add_eos=True)


def test_answers_to_one_prompt_stand_on_one_side(tmp_path, capsys):
    path = tmp_path / "twice.jsonl"
    records = [{"prompt": f"p{i}", "completion": text} for i in range(60) for text in (f"a{i}", f"other {i}")]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    prepare(capsys, "--source", "jsonl", "--path", path, "--out", tmp_path / "out")
    corpora = load_corpora({"source": "array_record", "path": str(tmp_path / "out"), "validation_fraction": 0.3})
    held = set(corpora.validation["array_record"].documents.tolist())
    assert 10 < len(held) < 60 and all(i ^ 1 in held for i in held)


def test_the_answers_are_part_of_what_identifies_the_data(tmp_path, capsys):
    prints = []
    for answers in ("all", "last"):
        path = tmp_path / "chats.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
        prepare(capsys, "--source", "jsonl", "--path", path, "--out", tmp_path / answers, "--answers", answers)
        prints.append(dataset(tmp_path / answers).fingerprint)
    assert len(set(prints)) == 2


@pytest.mark.parametrize("unit", ["documents", "tokens"])
def test_groups_are_mixed_by_examples_or_by_tokens(tmp_path, lines, capsys, unit):
    prepare(capsys, "--source", "jsonl", "--path", lines, "--out", tmp_path / "out", "--group-by", "length:30")
    part = lambda group, weight: {"source": "array_record", "path": str(tmp_path / "out"), "group": group,
                                  "weight": weight}
    made = build_dataset({"sources": {"long": part("long", 1.0), "short": part("short", 4.0)}, "mixture": unit,
                          "validation_fraction": 0.0}, batch_size=8, seq_len=160, seed=0)
    tokenizer = manifest_tokenizer(str(tmp_path / "out"))
    response = {tuple(ids): mask.sum() for ids, mask in (
        render(r["messages"], load_template("plain", tokenizer), tokenizer) for r in RECORDS)}
    count = {True: 0, False: 0}
    for step in range(60):
        for tokens, _, _ in documents(made.batch(step)):
            count[bool(response[tuple(tokens)] >= 30)] += 1 if unit == "documents" else len(tokens)
    assert count[False] / count[True] == pytest.approx(4.0, rel=0.08)
    held = build_dataset({"sources": {"long": part("long", 1.0), "short": part("short", 4.0)},
                          "validation_fraction": 0.4}, split="validation", batch_size=8, seq_len=160)
    apart = held.slices()
    assert {name: one.num_documents for name, one in apart.items()} == {
        name: found["documents"] for name, found in held.describe()["sources"].items()}
    for tokens, _, _ in documents(next(apart["long"].eval_batches())):
        assert response[tuple(tokens)] >= 30
    with pytest.raises(ValueError, match="no group 'medium'; its groups are short, long"):
        build_dataset({**part("medium", 1.0)}, batch_size=1, seq_len=160)


def test_documents_that_count_the_same_have_the_same_sum_of_weights(tmp_path, lines, capsys):
    prepare(capsys, "--source", "jsonl", "--path", lines, "--out", tmp_path / "out")
    plain, even = dataset(tmp_path / "out"), dataset(tmp_path / "out", weigh="documents")
    assert plain.fingerprint != even.fingerprint
    sums = []
    for step in range(-(-plain.num_rows_per_epoch // 3)):
        for (_, weights, _), (_, old, _) in zip(documents(even.batch(step)), documents(plain.batch(step)), strict=True):
            np.testing.assert_array_equal(weights > 0, old > 0)
            sums.append(weights.sum())
    np.testing.assert_allclose(sums, plain.num_targets / plain.num_documents, rtol=1e-5)


@pytest.mark.parametrize(("argv", "message"), [
    (["--kind", "chats"], "no kind 'chats'; did you mean 'chat'"),
    (["--answers", "last"], "--answers belongs to --kind chat"),
    (["--kind", "chat", "--workers", "1"], "prepared in one process"),
    (["--kind", "chat", "--template", "chatlm"], "did you mean 'chatml'"),
    (["--kind", "chat", "--source", "sotu", "--template", "plain"], "read from jsonl or parquet"),
])
def test_mistakes_are_one_line(tmp_path, lines, capsys, argv, message):
    base = [] if "sotu" in argv else ["--source", "jsonl", "--path", str(lines)]
    code = cli.main(["data", "prepare", *base, "--out", str(tmp_path / "out"), "--tokenizer", SPEC, *argv])
    assert code == 2 and message in capsys.readouterr().err


@pytest.mark.oracle
def test_gsm8k_gives_weight_to_its_answers(tmp_path, shared_data, capsys):
    path = shared_data / "gsm8k_test.jsonl"
    code, printed, _ = prepare(capsys, "--source", "jsonl", "--path", path, "--out", tmp_path / "out")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert code == 0 and "1,319 rows: 1,319 kept" in printed
    made = dataset(tmp_path / "out", seq_len=2048)
    assert made.num_targets == sum(len(row["answer"].encode()) + 1 for row in rows)
    known = {row["answer"] for row in rows}
    for _, weights, targets in documents(made.batch(0)):
        assert made.tokenizer.decode(targets[weights > 0]) in known
