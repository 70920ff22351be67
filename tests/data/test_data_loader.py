"""Batches: the contract of lm.core.batch, and pure functions of (seed, step) on any number of hosts."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.loader import build_dataset, iterate

TEXTS = tuple("".join(chr(97 + (i * 7 + j * j) % 26) for j in range(1 + (i * 37) % 90)) for i in range(60))

texts_of = st.lists(st.text("abcdé\n", min_size=1, max_size=30), min_size=1, max_size=25)


def dataset(texts=TEXTS, *, batch_size=4, seq_len=16, seed=0, split="train", **fields):
    data = {"source": "memory", "texts": tuple(texts), "validation_fraction": 0, **fields}
    return build_dataset(data, split=split, seed=seed, batch_size=batch_size, seq_len=seq_len)


def equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def join(batches):
    return [np.concatenate(field) for field in zip(*batches, strict=True)]


def documents_in(tokens, targets, weights, segments, positions):
    """Numpy-free reading of a row: (start, tokens, targets, weights) of each segment, with the contract checked."""
    found, seq_len = [], len(tokens)
    t = 0
    while t < seq_len and segments[t]:
        end = t
        while end < seq_len and segments[end] == segments[t]:
            assert positions[end] == end - t
            end += 1
        assert segments[t] == len(found) + 1
        found.append(([int(x) for x in tokens[t:end]], [int(x) for x in targets[t:end]],
                      [float(x) for x in weights[t:end]]))
        t = end
    assert all(segments[i] == 0 and weights[i] == 0 and positions[i] == i - t for i in range(t, seq_len))
    return found


@settings(deadline=None, max_examples=80)
@given(texts_of, st.integers(1, 12), st.sampled_from(["first_fit", "concat"]), st.booleans(), st.booleans())
def test_every_next_token_of_every_document_is_a_target_once(texts, seq_len, packing, bos, eos):
    total = sum(len(t.encode()) + bos for t in texts)
    seq_len = min(seq_len, total)
    data = dataset(texts, seq_len=seq_len, batch_size=1, packing=packing, add_bos=bos, add_eos=eos, packing_window=5,
                   tokenizer={"kind": "bytes", "bos_id": 256, "eos_id": 257})
    want_pairs, want_inputs = [], []
    for text in texts:
        stream = [256] * bos + list(text.encode()) + [257] * eos
        want_pairs += list(itertools.pairwise(stream))
        want_inputs += stream[:-1] if eos else stream
    pairs, inputs = [], []
    for row in range(data.num_rows_per_epoch):
        for tokens, targets, weights in documents_in(*(field[0] for field in data.batch(row))):
            assert set(weights) <= {0.0, 1.0} and 0.0 not in weights[:-1]
            assert targets[:-1] == tokens[1:]
            pairs += [(a, b) for a, b, w in zip(tokens, targets, weights, strict=True) if w]
            inputs += tokens
    assert sorted(pairs) == sorted(want_pairs)
    assert sorted(inputs) == sorted(want_inputs)
    assert data.num_targets == len(want_pairs)
    assert data.packing_efficiency == pytest.approx(len(inputs) / (data.num_rows_per_epoch * seq_len))
    blocks = [np.stack(b, 1) for b in data.target_blocks()]
    assert sorted(map(tuple, np.concatenate(blocks).tolist())) == sorted(want_pairs)


@pytest.mark.parametrize("packing", ["first_fit", "concat"])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_slices_of_the_hosts_make_up_the_global_batch(packing, hosts):
    data = dataset(packing=packing, batch_size=8)
    for step in (0, 3, 50):
        equal(join([data.batch(step, host, hosts) for host in range(hosts)]), data.batch(step))


@pytest.mark.parametrize("packing", ["first_fit", "concat"])
def test_a_batch_is_a_function_of_seed_and_step(packing):
    data = dataset(packing=packing)
    sequential = [data.batch(step) for step in range(60)]
    for step in (59, 0, 31, 7):
        equal(dataset(packing=packing).batch(step), sequential[step])
    equal(pickle.loads(pickle.dumps(data.reader)).rows(4 * 31, 4), sequential[31])
    assert (dataset(packing=packing, seed=1).batch(0).tokens != sequential[0].tokens).any()


def test_rows_do_not_depend_on_the_batch_size():
    equal(join([dataset(batch_size=2).batch(step) for step in range(6)]), dataset(batch_size=12).batch(0))


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (1, 2), (3, 8)])
def test_iteration_resumes_at_any_step(threads, prefetch):
    data = dataset()
    batches = iterate(data, 23, num_threads=threads, prefetch=prefetch)
    for want in range(23, 40):
        step, batch = next(batches)
        assert step == want
        equal(batch, data.batch(step))
    batches.close()


def test_iteration_by_host_gives_its_slice():
    data = dataset()
    batches = iterate(data, 5, process_index=1, process_count=2)
    equal(next(batches)[1], data.batch(5, 1, 2))
    batches.close()


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_in_order():
    data = dataset()
    batches = iterate(data, 2, num_workers=2, prefetch=2)
    for want in range(2, 9):
        step, batch = next(batches)
        assert step == want
        equal(batch, data.batch(step))
    batches.close()


def test_every_epoch_holds_the_same_targets_in_another_order():
    for packing in ("first_fit", "concat"):
        data = dataset(packing=packing, batch_size=1)
        n = data.num_rows_per_epoch
        epochs = [[data.batch(e * n + i) for i in range(n)] for e in range(3)]
        held = [sorted(np.concatenate([b.targets[b.weights > 0] for b in epoch]).tolist()) for epoch in epochs]
        assert held[0] == held[1] == held[2]
        assert any((a.tokens != b.tokens).any() for a, b in zip(epochs[0], epochs[1], strict=True))


def test_evaluation_sees_each_validation_target_once_and_fills_the_last_batch():
    data = dataset(split="validation", validation_fraction=0.3, batch_size=5)
    assert data.num_rows_per_epoch % 5
    batches = list(data.eval_batches())
    assert len(batches) == data.num_eval_batches() == -(-data.num_rows_per_epoch // 5)
    assert all(b.tokens.shape == (5, 16) for b in batches)
    assert sum(int((b.weights > 0).sum()) for b in batches) == data.num_targets
    spare = 5 - data.num_rows_per_epoch % 5
    assert not batches[-1].weights[-spare:].any() and not batches[-1].segment_ids[-spare:].any()
    np.testing.assert_array_equal(batches[-1].positions[-1], np.arange(16))
    assert len(list(data.eval_batches(2))) == 2


def test_limited_evaluation_is_the_same_rows_for_any_seed_hosts_and_batch_size():
    make = lambda seed, b: dataset(split="validation", validation_fraction=0.3, seed=seed, batch_size=b)
    want = join(list(make(0, 4).eval_batches(2)))
    equal(want, join(list(make(9, 8).eval_batches(1))))
    halves = [list(make(0, 4).eval_batches(2, host, 2)) for host in range(2)]
    equal(want, join([batch for pair in zip(*halves, strict=True) for batch in pair]))


def test_mixture_follows_the_weights_by_tokens_or_documents():
    short = {"source": "memory", "texts": ("a" * 8,) * 50, "weight": 1.0}
    long = {"source": "memory", "texts": ("b" * 32,) * 50, "weight": 3.0}
    for unit in ("tokens", "documents"):
        data = build_dataset({"sources": {"long": long, "short": short}, "mixture": unit, "validation_fraction": 0},
                             batch_size=10, seq_len=32)
        tokens = np.concatenate([data.batch(s).tokens for s in range(100)])
        counts = {c: int((tokens == ord(c)).sum()) for c in "ab"}
        ratio = counts["b"] / counts["a"] if unit == "tokens" else (counts["b"] / 32) / (counts["a"] / 8)
        assert ratio == pytest.approx(3, rel=0.02)
        described = data.describe()["sources"]
        assert described["long"]["tokens"] == 1600 and described["short"]["tokens"] == 400


def test_mixture_does_not_depend_on_the_order_of_the_config():
    a, b = ({"source": "memory", "texts": TEXTS[i::2]} for i in range(2))
    make = lambda sources: build_dataset({"sources": sources, "validation_fraction": 0}, batch_size=4, seq_len=16)
    first, second = make({"a": a, "b": b}), make({"b": b, "a": a})
    equal(first.batch(3), second.batch(3))
    assert first.fingerprint == second.fingerprint


def test_fingerprint_changes_with_everything_that_changes_batches():
    base = dataset().fingerprint
    others = [dataset(seed=1), dataset(batch_size=2), dataset(seq_len=8), dataset(packing="concat"),
              dataset(TEXTS[:-1]), dataset(shuffle=False), dataset(packing_window=3), dataset(split="train",
              validation_fraction=0.2), dataset(tokenizer={"kind": "bytes", "eos_id": 256}, add_eos=True)]
    found = {d.fingerprint for d in others}
    assert base == dataset().fingerprint and base not in found and len(found) == len(others)


def test_bytes_per_token_add_up_to_the_bytes_of_the_text():
    data = dataset(add_bos=True, tokenizer={"kind": "bytes", "bos_id": 256})
    batches = [data.batch(s) for s in range(data.num_rows_per_epoch // 4)]
    assert data.num_bytes == sum(len(t.encode()) for t in TEXTS)
    rows = join([data.batch(s, 0, 4) for s in range(len(batches))])
    assert data.token_bytes[rows[1]].shape == rows[1].shape
    total = sum(data.token_bytes[t].sum() for _, t in data.target_blocks())
    assert total == data.num_bytes


def test_the_longest_text_crosses_rows_without_losing_a_target():
    data = dataset(("abcdefghij",), seq_len=4, batch_size=1, shuffle=False)
    rows = [data.batch(i) for i in range(3)]
    assert ["".join(map(chr, r.tokens[0][r.segment_ids[0] > 0])) for r in rows] == ["abcd", "efgh", "ij"]
    assert ["".join(map(chr, r.targets[0][r.weights[0] > 0])) for r in rows] == ["bcde", "fghi", "j"]
    assert all(r.positions[0, 0] == 0 for r in rows)


@pytest.mark.parametrize(("fields", "message"), [
    ({"seq_len": 10_000}, "seq_len 10000 is longer than all training data, 2"),
    ({"split": "validation"}, "there is no validation data"),
    ({"split": "test"}, "no split 'test'"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"add_eos": True}, "needs a tokenizer that knows eos"),
    ({"texts": ("one",), "validation_fraction": 0.1}, "1 document cannot be divided"),
])
def test_errors_say_what_to_do(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        dataset(**fields)
    assert "\n" not in str(error.value)


def test_batches_are_divided_evenly_or_not_at_all():
    with pytest.raises(ValueError, match="cannot be divided among 3 processes"):
        dataset().batch(0, 0, 3)
    with pytest.raises(ValueError, match="process_index must be 0 to 1"):
        dataset().batch(0, 2, 2)
