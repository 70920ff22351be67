"""The interpolated bigram against loops over dicts."""

import math
from collections import Counter

import numpy as np
import pytest

from lm.data.loader import build_dataset
from lm.data.ngram import Bigram, PairCounts, fit_bigram, fit_weights

TEXTS = tuple("the cat sat on the mat and the dog ran "[i % 7:] * (1 + i % 5) + chr(97 + i % 26) for i in range(80))
DATA = {"source": "memory", "texts": TEXTS, "validation_fraction": 0.2}


def dataset(split, **kwargs):
    return build_dataset(DATA, split=split, batch_size=4, seq_len=32, **kwargs)


def pairs_of(data):
    return [(int(a), int(b)) for inputs, targets in data.target_blocks() for a, b in zip(inputs, targets, strict=True)]


def loop_probability(pairs, weights, vocab_size, a, b):
    both, context, unigram = Counter(pairs), Counter(x for x, _ in pairs), Counter(y for _, y in pairs)
    p1 = unigram[b] / len(pairs)
    p2 = both[a, b] / context[a] if context[a] else p1
    return weights[0] * p2 + weights[1] * p1 + weights[2] / vocab_size


def test_probabilities_equal_a_loop_and_sum_to_one():
    train = dataset("train")
    model = fit_bigram(train)
    pairs = pairs_of(train)
    assert model.weights.sum() == pytest.approx(1) and (model.weights > 0).all()
    for a in (ord("t"), ord(" "), ord("z"), 200):
        got = model.log2_prob(np.full(256, a), np.arange(256))
        want = [math.log2(loop_probability(pairs, model.weights, 256, a, b)) for b in range(256)]
        np.testing.assert_allclose(got, want, rtol=1e-12)
        assert np.exp2(got).sum() == pytest.approx(1, abs=1e-9)


def test_score_is_over_the_targets_that_a_model_is_evaluated_on():
    model, held = fit_bigram(dataset("train")), dataset("validation")
    batches = list(held.eval_batches(3))
    bits = size = count = 0.0
    for batch in batches:
        for b in range(4):
            for t in range(32):
                if batch.weights[b, t] > 0:
                    bits -= model.log2_prob(batch.tokens[b, t:t + 1], batch.targets[b, t:t + 1])[0]
                    size, count = size + 1, count + 1
    score = model.score(batches, held.token_bytes)
    assert score.bits_per_byte == pytest.approx(bits / size) and score.num_tokens == count == score.num_bytes
    assert score.bits_per_byte < 4


def test_em_finds_the_best_weights():
    rng = np.random.default_rng(0)
    parts, counts = rng.uniform(0.01, 1, (3, 40)), rng.integers(1, 9, 40)
    found = fit_weights(parts, counts, rounds=3000)
    loss = lambda w: float(counts @ np.log(w @ parts))
    grid = [np.array([i, j, 60 - i - j]) / 60 for i in range(61) for j in range(61 - i)]
    assert loss(found) >= max(loss(w) for w in grid) - 1e-9


def test_weights_are_fitted_without_the_validation_split(monkeypatch):
    train = dataset("train")
    seen = pairs_of(train)
    touched = []
    add = PairCounts.add
    monkeypatch.setattr(PairCounts, "add", lambda self, a, b: (touched.append((len(a), self)), add(self, a, b)))
    fit_bigram(train)
    by_table = Counter()
    for n, table in touched:
        by_table[id(table)] += n
    everything, rest = max(by_table.values()), sorted(by_table.values())[:2]
    assert everything == len(seen) == sum(rest)
    assert 0.05 < min(rest) / everything < 0.15


def test_sparse_counts_equal_dense_ones():
    rng = np.random.default_rng(0)
    dense, sparse = PairCounts(50), PairCounts(5000)
    queries = rng.integers(0, 50, (2, 300))
    assert not sparse.pair(*queries).any()
    for _ in range(4):
        inputs, targets = rng.integers(0, 50, (2, 200))
        for table in (dense, sparse):
            table.add(inputs, targets)
        np.testing.assert_array_equal(dense.pair(*queries), sparse.pair(*queries))
    for a, b in zip(dense.pairs(), sparse.pairs(), strict=True):
        np.testing.assert_array_equal(a, b)
    weights = np.array([0.6, 0.3, 0.1])
    unseen = Bigram(sparse, weights).log2_prob(np.array([4000]), np.array([4001]))
    assert unseen[0] == pytest.approx(math.log2(0.1 / 5000))


def test_nothing_to_count_or_score_is_an_error():
    single = build_dataset({"source": "memory", "texts": ("a", "b"), "validation_fraction": 0}, batch_size=1, seq_len=1)
    with pytest.raises(ValueError, match="no target to count"):
        fit_bigram(single)
    with pytest.raises(ValueError, match="no target to score"):
        fit_bigram(dataset("train")).score([], np.ones(256))
