"""Made rows: answers are right by another route, weight stands on them alone, rows depend on number and seed."""

import itertools
import re

import numpy as np
import pytest

from lm.core.fields import build
from lm.data.loader import build_dataset, iterate
from lm.data.options import DataOptions
from lm.data.synthetic import TASKS
from lm.data.synthetic.ids import Ids
from lm.data.synthetic.word_problem import GROUPS, multiplication

SMALL = {"facts": (dict(num_keys=5, num_classes=3), 9),
         "copy_chain": (dict(width=3, num_values=5), 14),
         "mqar": (dict(num_pairs=3, num_keys=6, num_values=5), 16),
         "passkey": (dict(blocks=(1, 2, 3), block=4, num_keys=5, num_filler=3), 14),
         "recital": (dict(num_documents=3, length=6, num_symbols=9, successors=3), 14),
         "selective_copy": (dict(num_tokens=3, num_symbols=4), 15),
         "style_pairs": (dict(num_contents=2, num_symbols=9, stop=0.2), 17),
         "word_problem": (dict(group="S3", length=5), 13)}
tasks = pytest.mark.parametrize("name", SMALL)


def dataset(name, *, split="train", seed=0, batch_size=6, **task):
    given, seq_len = SMALL[name]
    return build_dataset(dict(source=name, task={**given, **task}), split=split, seed=seed, batch_size=batch_size,
                         seq_len=seq_len)


def test_every_task_is_tested():
    assert set(SMALL) == set(TASKS)


@tasks
def test_a_batch_is_a_function_of_seed_and_step_whoever_makes_it(name):
    data = dataset(name)
    whole = data.batch(3)
    for index in range(2):
        for field, part in zip(whole, data.batch(3, index, 2), strict=True):
            assert (field[index * 3:index * 3 + 3] == part).all()
    batches = iterate(data, 3)
    step, first = next(batches)
    batches.close()
    assert step == 3 and (first.tokens == whole.tokens).all()
    others = (dataset(name, seed=1).batch(3), data.batch(4), dataset(name, split="validation").batch(3))
    assert all((other.tokens != whole.tokens).any() for other in others)
    held = [next(dataset(name, split="validation", seed=seed).eval_batches(1)).tokens for seed in (0, 1)]
    assert (held[0] == held[1]).all()


@tasks
def test_rows_are_whole_examples_and_padding(name):
    data = dataset(name)
    batch = data.batch(0)
    assert [f.dtype.name for f in batch] == ["int32", "int32", "float32", "int32", "int32"]
    assert (batch.tokens < data.tokenizer.vocab_size).all() and (batch.targets < data.tokenizer.vocab_size).all()
    assert set(np.unique(batch.weights)) <= {0.0, 1.0} and batch.weights.any(axis=1).all()
    assert not batch.weights[~batch.present].any() and batch.reset[:, 0].all()
    starts = (batch.positions == 0) & batch.present
    assert (np.cumsum(starts, 1)[batch.present] == batch.segment_ids[batch.present]).all()


def test_selective_copy_asks_for_the_symbols_in_order():
    batch = dataset("selective_copy").batch(0)
    for tokens, targets, weights in zip(batch.tokens, batch.targets, batch.weights, strict=True):
        symbols = [t for t in tokens if t >= 2]
        assert len(symbols) == 3 and list(targets[weights > 0]) == symbols
        assert (tokens[-3:] == 1).all() and (tokens[:-3] != 1).all() and list(np.flatnonzero(weights)) == [12, 13, 14]
    many = dataset("selective_copy", batch_size=40).batch(0).tokens
    assert len({tuple(np.flatnonzero(row >= 2)) for row in many}) > 9


def test_recital_repeats_its_members_and_never_shows_its_controls():
    data = dataset("recital", batch_size=400)
    task, batch = data.task, data.batch(0)
    members, controls = ({tuple(text) for text in task.documents(which)} for which in ("members", "controls"))
    shown = [tuple(batch.tokens[row, at:at + 6]) for row in range(400) for at in (0, 6)]
    assert abs(np.mean([text in members for text in shown]) - 0.5) < 0.06 and members <= set(shown)
    assert len(members) == len(controls) == 3 and not members & controls and not controls & set(shown)
    chain = task.chain()
    assert all(b in chain[a] for text in {*shown, *controls} for a, b in itertools.pairwise(text))
    np.testing.assert_array_equal(batch.weights[0], [1, 1, 1, 1, 1, 0] * 2 + [0, 0])
    np.testing.assert_array_equal(batch.targets[:, :5], batch.tokens[:, 1:6])
    fresh = dataset("recital", batch_size=50, share=0.0).batch(0).tokens[:, :6]
    assert not {tuple(text) for text in fresh} & members
    other = dataset("recital", seed=5).task
    assert {tuple(text) for text in other.documents("members")} == members  # of the task, not of the seed
    assert {tuple(text) for text in dataset("recital", draw=1).task.members} != members


@pytest.mark.parametrize("fields, message", [
    (dict(length=1), "length=1"), (dict(successors=10), "from 1 to num_symbols=9"), (dict(share=1.5), "share=1.5")])
def test_a_recital_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataset("recital", **fields)


def test_facts_are_one_class_a_pair_in_training_and_validation():
    told, counts = {}, np.zeros(3)
    for data in (dataset("facts", batch_size=60), dataset("facts", split="validation", batch_size=60)):
        batch = data.batch(0)
        assert (np.flatnonzero(batch.weights[0]) == [1, 3, 5, 7]).all() and not batch.present[:, 8].any()
        for at in (1, 3, 5, 7):
            for first, second, fact in zip(batch.tokens[:, at - 1], batch.tokens[:, at], batch.targets[:, at],
                                           strict=True):
                assert first < 5 <= second < 10 <= fact < 13 and told.setdefault((first, second), fact) == fact
    for fact in told.values():
        counts[fact - 10] += 1
    assert len(told) == 25 and (counts > 0).all()
    other = dataset("facts", batch_size=60, draw=1).batch(0)
    pairs = zip(other.tokens[:, 0], other.tokens[:, 1], other.targets[:, 1], strict=True)
    assert any(told[first, second] != fact for first, second, fact in pairs)
    batch = dataset("facts", batch_size=60, part=(3, 5)).batch(0)
    assert (batch.tokens[:, :8:2] == 3).all() and set(np.unique(batch.tokens[:, 1:8:2])) == set(range(5, 10))
    assert all(told[3, second] == fact for second, fact in zip(batch.tokens[:, 1], batch.targets[:, 1], strict=True))
    with pytest.raises(ValueError, match="n a divisor of num_keys=5"):
        dataset("facts", part=(0, 2))


def test_mqar_asks_for_each_key_once_and_its_value_follows():
    batch = dataset("mqar").batch(0)
    for tokens, targets, weights in zip(batch.tokens, batch.targets, batch.weights, strict=True):
        value = dict(zip(tokens[0:6:2].tolist(), tokens[1:6:2].tolist(), strict=True))
        asked = np.flatnonzero(weights)
        assert len(value) == 3 and sorted(tokens[asked]) == sorted(value) and asked.min() >= 6
        assert [value[t] for t in tokens[asked]] == list(targets[asked]) == list(tokens[asked + 1])
        rest = np.delete(tokens[6:], np.concatenate([asked, asked + 1]) - 6)
        assert (rest == 0).all() and max(value) <= 6 < min(value.values())


def test_words_of_s3_are_products_of_permutations():
    elements = list(itertools.permutations(range(3)))
    batch = dataset("word_problem").batch(0)
    for tokens, targets, weights in zip(batch.tokens, batch.targets, batch.weights, strict=True):
        assert list(np.flatnonzero(weights)) == list(range(10))
        for begin in (0, 5):
            points = (0, 1, 2)
            for t in range(begin, begin + 5):
                points = tuple(elements[tokens[t]][p] for p in points)  # where each point is by now
                assert targets[t] == elements.index(points)


@pytest.mark.parametrize("group", GROUPS)
def test_groups_are_groups(group):
    table = multiplication(group)
    size = {"Z2": 2, "S3": 6, "A5": 60, "S5": 120}[group]
    assert table.shape == (size, size) and (table[0] == range(size)).all() and (table[:, 0] == range(size)).all()
    assert all(len(set(row)) == size for row in (*table, *table.T))
    a, b, c = np.random.default_rng(0).integers(0, size, (3, 50))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    assert (table == table.T).all() == (group == "Z2")


def test_slices_put_weight_on_the_end_of_each_length():
    data = build_dataset(dict(source="word_problem", task=dict(report=(8, 16))), split="validation", batch_size=2,
                         seq_len=16)
    parts = data.slices()
    where = {name: np.flatnonzero(part.batch(0).weights[0]).tolist() for name, part in parts.items()}
    assert where == {"length_8": [7], "length_16": [14, 15]}
    assert all((part.batch(0).tokens == data.batch(0).tokens).all() for part in parts.values())
    assert dataset("mqar").slices() == {}


def test_ids_are_numbers():
    ids = Ids(12)
    assert ids.decode([3, 11, 0]) == "3 11 0 " and ids.encode("3 11  0").tolist() == [3, 11, 0]
    for text in ("12", "a", "-1"):
        with pytest.raises(ValueError, match=r"is no id; write numbers from 0 to 11"):
            ids.encode(text)


@pytest.mark.parametrize("given, message", [
    (dict(source="mqra"), "did you mean 'mqar'"),
    (dict(source="mqar", task=dict(num_pair=3)), r"config.data.task has no field 'num_pair'; did you mean 'num_pairs'"),
    (dict(source="mqar", task=dict(num_pairs=100)), r"config.data.task: .*num_keys=64 is less than num_pairs=100"),
    (dict(source="word_problem", task=dict(group="S4")), "It takes: Z2, S3"),
    (dict(source="word_problem", task=dict(length=8, report=(9,))), "lengths from 1 to 8"),
    (dict(source="sotu", task=dict(num_pairs=3)), "source='sotu' reads text"),
    (dict(source="mqar", separator="x"), "makes rows"),
    (dict(source="mqar", path="x"), "takes no path"),
    (dict(source="mqar", packing="lanes"), "makes rows that go on"),
    (dict(source="mqar", tokenizer="bytes"), "makes ids; leave out tokenizer"),
    (dict(sources=dict(a=dict(source="mqar"))), "cannot be mixed"),
    (dict(source="mqar", validation=dict(source="sotu")), "as many ids"),
    (dict(source="mqar", validation=dict(source="mqar", task=dict(num_keys=9))), "as many ids"),
    (dict(source="sotu", validation=dict(source="mqar")), "must be of the same source"),
])
def test_mistakes_are_one_line(given, message):
    with pytest.raises(ValueError, match=message) as error:
        build(DataOptions, given, "config.data")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, seq_len, least", [("mqar", 31, 32), ("selective_copy", 7, 8), ("word_problem", 6, 7)])
def test_rows_that_are_too_short_name_the_length_that_fits(name, seq_len, least):
    task = dict(length=7) if name == "word_problem" else {}
    given = dict(source=name, task=task)
    with pytest.raises(ValueError, match=f"at least {least}; got {seq_len}"):
        build_dataset(given, batch_size=1, seq_len=seq_len)
    build_dataset(given, batch_size=1, seq_len=least).batch(0)


def test_texts_are_not_asked_of_made_rows():
    from lm.data.options import SourceOptions
    from lm.data.sources import read_documents
    with pytest.raises(ValueError, match=re.escape("source 'mqar' holds no texts to read; those that do: text")):
        next(read_documents(SourceOptions(source="mqar")))


def test_passkey_asks_at_the_end_for_the_key_of_the_first_block_and_each_length_has_rows_of_its_own():
    data = dataset("passkey", batch_size=60)
    batch = data.batch(0)
    lengths = batch.present.sum(1)
    assert set(lengths) == {4, 8, 12}
    for tokens, targets, weights, length in zip(batch.tokens, batch.targets, batch.weights, lengths, strict=True):
        keys = np.flatnonzero((tokens >= 1) & (tokens < 6))
        assert len(keys) == 1 and keys[0] < 3 and (tokens[:length] == 0).nonzero()[0].tolist() == [length - 1]
        assert weights.nonzero()[0].tolist() == [length - 1] and targets[length - 1] == tokens[keys[0]]
    slices = data.slices()
    assert set(slices) == {"blocks_1", "blocks_2", "blocks_3"}
    for name, part in slices.items():
        found = part.batch(0)
        assert set(found.present.sum(1)) == {4 * int(name[-1])} and (found.weights.sum(1) == 1).all()


def test_passkey_refuses_texts_that_are_none():
    with pytest.raises(ValueError, match=r"needs train.seq_len \(or eval.seq_len\) of at least 16"):
        dataset("passkey", blocks=(4,))
    for fields in (dict(blocks=()), dict(blocks=(2, 2)), dict(block=1)):
        with pytest.raises(ValueError, match="passkey: block"):
            dataset("passkey", **fields)
