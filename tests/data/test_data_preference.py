"""Preferences as data: forms of records, what is refused and where, rows that hold whole pairs, and cut prompts."""

import json
import logging

import numpy as np
import pytest

from lm.data.chat_template import BadChat, load_template
from lm.data.loader import build_dataset, iterate
from lm.data.options import SourceOptions
from lm.data.preference.examples import CHOSEN, REJECTED, PreferenceOptions, documents_of
from lm.data.preference.prepare import prepare_preferences
from lm.data.tokenizer import Bytes

BYTES = Bytes(eos_id=256)
PLAIN = load_template("plain", BYTES)
HELLO = [{"role": "user", "content": "Hi"}]
CHAT = dict(prompt="Say a colour.", chosen="Blue.", rejected="No!")


def texts(record, **options):
    """(kind, prompt, response) of each document, as text; what does not count is marked by '_'."""
    made, _ = documents_of(record, PreferenceOptions(**options), PLAIN, BYTES)
    out = []
    for one in made:
        shown = "".join(chr(i) if i < 256 else "$" for i in one.ids)
        counted = "".join(c if r else "_" for c, r in zip(shown, one.response, strict=True))
        out.append((one.kind, shown[:one.prompt], counted[one.prompt:]))
    return out


def test_texts_become_one_turn_each():
    assert texts(CHAT) == [(CHOSEN, "User:\nSay a colour.\n\nAssistant:\n", "Blue.$__"),
                           (REJECTED, "User:\nSay a colour.\n\nAssistant:\n", "No!$__")]
    assert [t[2] for t in texts(CHAT, learn_end=False)] == ["Blue.___", "No!___"]


def test_dialogues_without_a_prompt_are_divided_where_they_part():
    """Several turns: answers that both share are prompt, and what the user says after the response does not count."""
    shared = [*HELLO, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "So?"}]
    chosen = [*shared, {"role": "assistant", "content": "A"}, {"role": "user", "content": "B"},
              {"role": "assistant", "content": "C"}]
    rejected = [*shared, {"role": "assistant", "content": "D"}]
    (_, prompt, good), (_, same, bad) = texts(dict(chosen=chosen, rejected=rejected))
    assert prompt == same == "User:\nHi\n\nAssistant:\nYes?$\n\nUser:\nSo?\n\nAssistant:\n"
    assert bad == "D$__" and good.replace("_", "") == "A$C$"
    as_text = {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: So?\n\nAssistant: A",
               "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: So?\n\nAssistant: D"}
    assert texts(as_text) == [(0, prompt, "A$__"), (1, prompt, "D$__")]


def test_a_response_by_itself_takes_its_kind_from_the_label():
    record = dict(prompt=HELLO, completion="Hm", label=False)
    assert [(kind, response) for kind, _, response in texts(record)] == [(REJECTED, "Hm$__")]
    assert texts({**record, "label": True})[0][0] == CHOSEN


def test_a_prompt_repeated_in_front_of_the_response_is_taken_off():
    record = dict(prompt=HELLO, chosen=[*HELLO, {"role": "assistant", "content": "Hello"}],
                  rejected=[{"role": "assistant", "content": "Go"}])
    assert [t[2] for t in texts(record)] == ["Hello$__", "Go$__"]


@pytest.mark.parametrize("record, reason", [
    ({**CHAT, "rejected": "Blue."}, "identical responses"), ({**CHAT, "chosen": " \n"}, "empty response"),
    ({**CHAT, "chosen": [{"role": "alien", "content": "x"}]}, "unknown role"),
    ({**CHAT, "prompt": [{"role": "alien", "content": "x"}]}, "unknown role"),
    ({"chosen": [*HELLO, {"role": "assistant", "content": "A"}],
      "rejected": [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "A"}]}, "prompts differ"),
    ({"chosen": "plain", "rejected": "text"}, "no prompt"), ({"prompt": "x"}, "fields missing"),
    ({"prompt": "x", "completion": "y", "label": "good"}, "no label"),
    ({"chosen": HELLO, "rejected": HELLO}, "prompts differ"),
    ({"chosen": [{"role": "assistant", "content": "A"}], "rejected": [{"role": "assistant", "content": "B"}]},
     "empty prompt")])
def test_records_that_are_no_pair_say_why(record, reason):
    with pytest.raises(BadChat) as error:
        texts(record)
    assert error.value.reason == reason


# --- A folder, and rows of it.

def write(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return SourceOptions(source="jsonl", path=str(path))


def numbered(n):
    """Pairs of several lengths, each of its own prompt; {number} finds them again."""
    return [dict(prompt=f"[{i:02d}]" + "?" * (i % 7), chosen="a" * (1 + i % 5), rejected="b" * (1 + i % 4))
            for i in range(n)]


@pytest.fixture
def prepared(tmp_path):
    def make(records, options=None, **given):
        source = write(tmp_path / "pairs.jsonl", records)
        out = tmp_path / "out"
        manifest, account = prepare_preferences(source, options or PreferenceOptions(template="text"), BYTES, str(out),
                                                **given)
        return dict(source="pairs", path=str(out), validation_fraction=0.0), manifest, account
    return make


def test_every_row_that_is_left_out_is_counted_with_its_line(prepared, tmp_path):
    records = [CHAT, {**CHAT, "rejected": "Blue."}, "not json", {**CHAT, "chosen": ""}, {"text": "x"}, CHAT]
    _, manifest, account = prepared(records)
    assert manifest["preference"]["pairs"] == 2 and account.rows == 6 and account.kept == 2
    assert account.counts == {"identical responses": 1, "no JSON": 1, "empty response": 1, "fields missing": 1}
    found = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(f["where"].rsplit(":", 1)[1], f["reason"]) for f in found] == [
        ("2", "identical responses"), ("3", "no JSON"), ("4", "empty response"), ("5", "fields missing")]


def test_the_first_bad_row_stops_where_that_is_asked_for(prepared):
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: chosen and rejected are the same"):
        prepared([CHAT, {**CHAT, "rejected": "Blue."}], PreferenceOptions(template="text", bad_rows="refuse"))


def documents(batch):
    """{(row, place): {kind: (prompt text, response text)}} of a batch, read from its five arrays alone."""
    out = {}
    text = lambda ids: "".join(chr(i) if i < 256 else "$" for i in ids)
    for row in range(len(batch.tokens)):
        for segment in sorted({*batch.segment_ids[row].tolist()} - {0}):
            inside = np.flatnonzero(batch.segment_ids[row] == segment)
            assert (np.diff(inside) == 1).all() and (batch.positions[row, inside] == np.arange(len(inside))).all()
            np.testing.assert_array_equal(batch.targets[row, inside[:-1]], batch.tokens[row, inside[1:]])
            stream = [*batch.tokens[row, inside], batch.targets[row, inside[-1]]]
            first = int(np.flatnonzero(batch.weights[row, inside])[0]) + 1
            assert (batch.weights[row, inside[first - 1:]] == 1).all()
            place, kind = divmod(segment - 1, 3)
            out.setdefault((row, place), {})[kind] = (text(stream[:first]), text(stream[first:]))
    return out


def test_an_epoch_holds_every_pair_once_and_no_row_divides_one(prepared):
    records = numbered(30)
    data, _, _ = prepared(records)
    dataset = build_dataset(data, batch_size=3, seq_len=64, seed=1)
    assert dataset.num_pairs == 30 and dataset.packing_efficiency > 0.8
    found = {}
    for batch in dataset.eval_batches():
        for pair in documents(batch).values():
            assert pair[0][0] == pair[1][0]
            found[pair[0][0]] = (pair[0][1], pair[1][1])
    assert found == {r["prompt"]: (r["chosen"] + "$", r["rejected"] + "$") for r in records}


def test_batches_are_a_function_of_step_and_shared_among_hosts(prepared):
    data, _, _ = prepared(numbered(30))
    dataset = build_dataset(data, batch_size=4, seq_len=64, seed=1)
    whole = dataset.batch(5)
    halves = [dataset.batch(5, p, 2) for p in range(2)]
    for field, a, b in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(field, np.concatenate([a, b]))
    steps = iterate(dataset, 5)
    np.testing.assert_array_equal(next(steps)[1].tokens, whole.tokens)
    steps.close()
    for row in range(4):
        for group, pair in documents(type(whole)(*(field[row:row + 1] for field in whole))).items():
            assert dataset.place(5, row, group[1]).endswith(f"pairs.jsonl:{int(pair[0][0][1:3]) + 1}")
    numbers = {int(place.rsplit(":", 1)[1]) for place in dataset.places(5)}
    assert numbers == {int(p[0][0][1:3]) + 1 for p in documents(whole).values()}


def test_a_long_prompt_loses_its_start_and_never_the_end_of_a_response(prepared, caplog):
    records = [dict(prompt="0123456789" * 4, chosen="x" * 9, rejected="y" * 4), *numbered(6)]
    data, _, _ = prepared(records)
    with caplog.at_level(logging.WARNING):
        dataset = build_dataset(data, batch_size=1, seq_len=34)
    assert dataset.num_cut == 1 and dataset.left_out == [] and "pairs.jsonl:1" in caplog.text
    pairs = [p for b in dataset.eval_batches() for p in documents(b).values()]
    (cut,) = [p for p in pairs if p[0][1].startswith("x")]
    assert cut[0][1] == "x" * 9 + "$" and cut[1][1] == "y" * 4 + "$"
    assert cut[0][0] == cut[1][0] and ("0123456789" * 4).endswith(cut[0][0]) and len(cut[0][0]) == (34 - 13) // 2
    assert len(pairs) == 7


def test_what_does_not_fit_is_left_out_and_named_or_refused(prepared, caplog):
    records = [*numbered(4), dict(prompt="?", chosen="x" * 40, rejected="y"), dict(prompt="?" * 60, chosen="k",
                                                                                  rejected="l")]
    data, _, _ = prepared(records)
    with caplog.at_level(logging.WARNING):
        dataset = build_dataset(data, batch_size=1, seq_len=32)
    assert [p.rsplit(":", 1)[1] for p in dataset.left_out] == ["5"] and "left out" in caplog.text
    skipping = build_dataset({**data, "too_long": "skip"}, batch_size=1, seq_len=32)
    assert [p.rsplit(":", 1)[1] for p in skipping.left_out] == ["5", "6"] and skipping.num_pairs == 4
    with pytest.raises(ValueError, match=r"pairs\.jsonl:5 and 1 other"):
        build_dataset({**data, "too_long": "refuse"}, batch_size=1, seq_len=32)
    with pytest.raises(ValueError, match="no pair of the train split fits"):
        build_dataset(data, batch_size=1, seq_len=2)


def test_responses_behind_another_prompt(prepared):
    """Each group's chosen response, once, behind the prompt of another group, and each prompt is used once."""
    data, _, _ = prepared(numbered(12))
    dataset = build_dataset({**data, "mismatched": True}, batch_size=2, seq_len=96)
    groups = [p for b in dataset.eval_batches() for p in documents(b).values()]
    assert len(groups) == 12
    for group in groups:
        assert group[2][1] == group[0][1] and group[2][0] != group[0][0]
    assert {g[2][0] for g in groups} == {g[0][0] for g in groups}


def test_single_responses_and_pairs_share_rows(prepared):
    single = [dict(prompt=f"({i})", completion="c" * (i + 1), label=i % 2 == 0) for i in range(6)]
    data, manifest, _ = prepared([*numbered(4), *single])
    assert manifest["preference"]["pairs"] == 4 and manifest["preference"]["single"] == 6
    groups = [p for b in build_dataset(data, batch_size=1, seq_len=64).eval_batches() for p in documents(b).values()]
    assert sorted(tuple(g) for g in groups) == [(0,)] * 3 + [(0, 1)] * 4 + [(1,)] * 3


def test_all_pairs_of_a_prompt_are_on_one_side_of_the_split(prepared):
    records = [dict(prompt=f"p{i // 2}", chosen="a" * (1 + i), rejected="b") for i in range(40)]
    data, _, _ = prepared(records, validation_fraction=0.3)
    sides = [{p[0][0] for b in build_dataset({**data, "validation_fraction": None}, split=split, batch_size=1,
                                             seq_len=128).eval_batches() for p in documents(b).values()}
             for split in ("train", "validation")]
    assert sides[0] and sides[1] and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 20


def test_rows_bring_the_reference_that_belongs_to_them(prepared):
    data, _, _ = prepared(numbered(20))
    dataset = build_dataset(data, batch_size=2, seq_len=64)
    dataset.reader.reference = np.concatenate([b.tokens for b in dataset.eval_batches()])[
        :dataset.num_rows_per_epoch].astype(np.float32)
    for step in (0, 3):
        batch = dataset.batch(step)
        np.testing.assert_array_equal(batch.reference, batch.tokens)


def test_folders_of_another_kind_and_packings_that_divide_are_refused(prepared, tmp_path):
    data, _, _ = prepared(numbered(4))
    with pytest.raises(ValueError, match="would divide pairs"):
        build_dataset({**data, "packing": "concat"}, batch_size=1, seq_len=64)
    from lm.data.prepare import prepare
    prepare(SourceOptions(source="memory", texts=("abc", "def")), BYTES, str(tmp_path / "text"))
    with pytest.raises(ValueError, match="holds no pairs"):
        build_dataset({**data, "path": str(tmp_path / "text")}, batch_size=1, seq_len=2)


def test_parquet_holds_the_same_pairs(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    turns = [dict(prompt=HELLO, chosen=[{"role": "assistant", "content": f"good {i}"}],
                  rejected=[{"role": "assistant", "content": "bad"}]) for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist([*turns, {**turns[0], "rejected": turns[0]["chosen"]}]),
                        tmp_path / "pairs.parquet")
    source = SourceOptions(source="parquet", path=str(tmp_path / "pairs.parquet"))
    manifest, account = prepare_preferences(source, PreferenceOptions(template="plain"), BYTES, str(tmp_path / "out"))
    assert manifest["preference"]["pairs"] == 3 and account.counts == {"identical responses": 1}
    assert account.faults[0]["where"].endswith("row 3")


def test_a_step_that_went_wrong_names_the_lines_of_its_pairs(prepared, caplog):
    from launch.preference import reporting
    data, _, _ = prepared(numbered(9))
    dataset = build_dataset(data, batch_size=1, seq_len=64)
    with caplog.at_level(logging.ERROR):
        batch = reporting(dataset)(2, 0, 1)
    np.testing.assert_array_equal(batch.tokens, dataset.batch(2).tokens)
    assert all(place in caplog.text for place in dataset.places(2)) and dataset.places(2)


def test_a_cached_reference_that_is_not_finite_names_its_lines_when_it_is_read(prepared, tmp_path, caplog):
    from lm.tasks.reference_cache import read
    data, _, _ = prepared(numbered(8))
    dataset = build_dataset(data, batch_size=1, seq_len=64)
    table, row = np.zeros((dataset.num_rows_per_epoch, 64), np.float32), dataset.num_rows_per_epoch - 1
    table[row, np.flatnonzero(dataset.reader.read([row]).segment_ids[0] == 5)[0]] = -np.inf
    np.save(tmp_path / "reference.npy", table)
    line = dataset.row_places(row)[1]
    with pytest.raises(ValueError, match=f"1 of the pairs .*not finite: {line};"):
        read(tmp_path / "reference.npy", dataset)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(read(tmp_path / "reference.npy", dataset, on_nonfinite="skip"), table)
    assert f"{line}; they are left out" in caplog.text


def test_pairs_that_the_reference_cannot_score_are_left_out_whole(prepared):
    data, _, _ = prepared(numbered(8))
    dataset = build_dataset(data, batch_size=1, seq_len=64)
    before = dataset.reader.read([0])
    table = np.zeros((dataset.num_rows_per_epoch, 64), np.float32)
    table[0, np.flatnonzero(before.segment_ids[0] == 2)[-1]] = np.nan  # the rejected response of the first pair
    dataset.reader.reference = table
    after = dataset.reader.read([0])
    first = np.isin(before.segment_ids[0], (1, 2))
    assert not after.weights[0, first].any() and np.isfinite(after.reference).all()
    np.testing.assert_array_equal(after.weights[0, ~first], before.weights[0, ~first])
