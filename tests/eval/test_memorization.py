"""The memorization test on a model whose every answer is known: a table of what follows each id."""

import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.goldfish import Goldfish, dropped
from lm.core.types import Head, Output
from lm.data.options import DataOptions
from lm.data.synthetic.ids import Ids
from lm.eval.base import evaluate
from lm.eval.documents import target_nats
from lm.eval.memorization import Memorization, hidden_targets
from lm.eval.memorization_figure import draw
from lm.eval.memorization_options import MemorizationOptions
from lm.eval.memorization_texts import matched, read_texts, texts_of

V, LENGTH = 32, 20
NEXT = np.random.default_rng(0).permutation(V)
DECODE = Ids(V).decode


def initial_state(batch_size, *, capacity=0):
    return jnp.zeros((batch_size, 1))


def apply(params, tokens, state=None, *, reset=None, positions=None, weights=None, key=None):
    """Logit 4 for the id that the table says, 0 for the others."""
    hidden = 4.0 * (jnp.asarray(NEXT)[tokens][..., None] == jnp.arange(V)).astype(jnp.float32)
    return Output(hidden, Head(params, None, V, None), state, {})


PARAMS = jnp.eye(V)


def walk(start, wrong_at=()):
    """The text that the table writes, with another id at some places."""
    out = [start]
    for t in range(1, LENGTH):
        out.append((NEXT[out[-1]] + (t in wrong_at)) % V)
    return np.array(out, np.int32)


@functools.cache
def report(goldfish=None, beams=None, reference=None, batch_size=4):
    """Five members: three by the table, one that leaves it at 15, one at 12. Four controls that leave it everywhere."""
    members = [walk(0), walk(1), walk(2), walk(3, (15,)), walk(4, (12,))]
    controls = [walk(n, range(1, LENGTH)) for n in range(5, 9)]
    options = MemorizationOptions(prefix=6, suffix=8, beams=beams, batch_size=batch_size)
    texts = matched(texts_of(members, DECODE), texts_of(controls, DECODE), options, seq_len=64, decode=DECODE)
    return Memorization(texts, options, initial_state, DECODE, goldfish, reference).measure(apply, PARAMS)


def test_exact_continuations_are_counted_and_their_first_miss():
    metrics, texts = report()
    assert metrics["exact_match"] == 3 / 5 and metrics["exact_match_controls"] == 0
    assert (metrics["members"], metrics["controls"], metrics["skipped"]) == (5, 4, 0)
    assert [text["first_miss"] for text in texts[:5]] == [None, None, None, 3, 0]
    assert [text["kind"] for text in texts] == ["member"] * 5 + ["control"] * 4
    assert texts[3]["longest_match"] >= 3 and texts[0]["longest_match"] == 8 and texts[0]["rouge_l"] == 1.0
    assert texts[0]["completion"] == DECODE(walk(0)[-8:])


def test_nats_of_every_target_are_those_of_the_table():
    right, wrong = np.log(np.exp(4) + V - 1) - 4, np.log(np.exp(4) + V - 1)
    short, long = walk(0)[:7], walk(3, (15,))
    nats = target_nats(apply, PARAMS, [short, long], 4)
    np.testing.assert_allclose(nats[0], np.full(6, right), rtol=1e-5)
    np.testing.assert_allclose(nats[1], np.where(np.arange(1, LENGTH) == 15, wrong, right), rtol=1e-5)
    assert [text["loss"] for text in report().texts[:1]] == pytest.approx([right], rel=1e-5)


def test_members_are_told_from_controls_and_exposure_counts_ranks():
    metrics = report().metrics
    assert all(metrics[f"{kind}_{score}"] == 1.0 for kind in ("auc", "tpr") for score in ("loss", "min_k"))
    assert metrics["exposure"] == metrics["exposure_most"] == np.log2(5)
    assert "auc_reference" not in metrics and metrics["loss_members"] < metrics["loss_controls"]


def test_a_reference_that_knows_the_texts_too_takes_the_ratio_away():
    same = lambda texts: [np.full(19, report().texts[n % 9]["loss"]) for n, _ in enumerate(texts)]
    metrics, texts = report(reference=same, batch_size=16)
    assert [text["reference"] for text in texts] == pytest.approx([1.0] * 9) and metrics["auc_reference"] < 0.9


def test_beam_search_finds_what_greedy_decoding_missed():
    """Texts that leave the table once are among the 1 + 8 x 31 most probable, which are fewer than the beams."""
    metrics, texts = report(beams=256)
    assert metrics["beam_exact_match"] == 3 / 5 and metrics["beam_any_match"] == 1.0
    assert metrics["beam_any_match_controls"] == 0 and texts[4]["beam_exact_match"] == 0.0


def test_misses_are_held_against_the_mask_of_training():
    goldfish = Goldfish(k=2, h=3)
    metrics, texts = report(goldfish=goldfish)
    at = [bool(hidden_targets(goldfish, ids)[place - 1]) for ids, place in ((walk(3, (15,)), 15), (walk(4, (12,)), 12))]
    assert [text["miss_at_dropped"] for text in texts[:5]] == [None, None, None, *at]
    assert metrics["misses"] == 2 and metrics["miss_at_dropped"] == np.mean(at)
    assert metrics["dropped_share"] == pytest.approx(np.mean([hidden_targets(goldfish, ids)[-8:] for ids in (
        walk(0), walk(1), walk(2), walk(3, (15,)), walk(4, (12,)))]))
    assert "misses" not in report(goldfish=Goldfish(mask="random")).metrics


def test_a_mask_of_a_text_is_that_of_its_row():
    from lm.core.batch import Batch
    ids, options = walk(0), Goldfish(k=2, h=4)
    tokens, ones = np.stack([ids[:-1]] * 3), np.ones((3, LENGTH - 1), np.int32)
    batch = Batch(tokens, np.stack([ids[1:]] * 3), ones, ones, np.cumsum(ones, axis=1) - 1)
    np.testing.assert_array_equal(dropped(options, batch)[1], hidden_targets(options, ids))


def test_names_of_metrics():
    options = MemorizationOptions(prefix=6, suffix=8)
    texts = matched(texts_of([walk(0)], DECODE), texts_of([walk(5, (3,))], DECODE), options, seq_len=64, decode=DECODE)
    found = evaluate([Memorization(texts, options, initial_state, DECODE)], apply, PARAMS)
    assert found["eval/memorization/exact_match"] == 1.0
    assert all(name.startswith("eval/memorization/") for name in found)


def test_the_picture_is_a_png():
    assert draw(report().texts, "a title").startswith(b"\x89PNG")


@pytest.mark.parametrize("fields, message", [
    (dict(members="a.txt"), "members and no controls.*means nothing"), (dict(controls="a"), "controls and no members"),
    (dict(suffix=0), "suffix=0 must be at least 1"), (dict(beams=0), "beams=0.*or None"),
    (dict(min_k=0.0), "min_k=0.0 must be above 0"), (dict(prefix=-1), "prefix=-1")])
def test_tests_that_say_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MemorizationOptions(**fields).check()


def make(members, controls, **fields):
    options = MemorizationOptions(**{"prefix": 6, "suffix": 8, **fields})
    return matched(texts_of(members, DECODE), texts_of(controls, DECODE), options, seq_len=16, decode=DECODE)


def test_texts_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="control 1 is member 0"):
        make([walk(0)], [walk(1), walk(0)])
    other_end = np.append(walk(0)[:16], walk(1)[:4])  # rows have 16 tokens
    with pytest.raises(ValueError, match="control 0 is member 1 in the 16 tokens of a row"):
        make([walk(1), walk(0)], [other_end])
    with pytest.raises(ValueError, match=r"none of the 1 controls has 14 tokens \(the longest has 9"):
        make([walk(0)], [walk(1)[:9]])
    with pytest.raises(ValueError, match="need 18 tokens, and training rows have 16"):
        make([walk(0)], [walk(1)], prefix=10)


def test_texts_are_cut_to_rows_and_short_ones_counted(caplog):
    found = make([walk(0), walk(1)[:5], walk(2)], [walk(3)[:14], walk(4)], limit=1)
    assert found.skipped == 1 and len(found.members) == len(found.controls) == 1
    assert len(found.members[0].ids) == 16 and found.members[0].text == DECODE(walk(0)[:16])
    assert "1 texts are shorter" in caplog.text
    make([walk(n)[:14] for n in range(3)], [walk(9)], prefix=3, suffix=3)
    assert not re.search("not matched", caplog.text)
    make([walk(n)[:7] for n in range(3)], [walk(9)], prefix=3, suffix=3)
    assert re.search("members have 7 tokens in the mean and controls 16: they are not matched", caplog.text)


def test_files_are_read_as_the_training_data_would_be(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"body": "1 2 3"}\n{"body": "4 5"}\n')
    (tmp_path / "texts.txt").write_text("6 7\n\n8 9")
    data = DataOptions(source="memory", texts=("1",), text_field="body", separator="\n\n")
    records = read_texts(str(tmp_path / "texts.jsonl"), data, Ids(V))
    assert [text.ids.tolist() for text in records] == [[1, 2, 3], [4, 5]]
    assert [text.text for text in read_texts(str(tmp_path / "texts.txt"), data, Ids(V))] == ["6 7", "8 9"]
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "a.jsonl").write_text('{"body": "1 2"}\n{"body": "3"}\n')
    for path in ("records", "records/*", "rec*/a*"):
        assert [text.text for text in read_texts(str(tmp_path / path), data, Ids(V))] == ["1 2", "3"], path
    with pytest.raises(ValueError, match=r"several kinds: texts.jsonl \(jsonl\), texts.txt \(text\)"):
        read_texts(str(tmp_path / "texts*"), data, Ids(V))
