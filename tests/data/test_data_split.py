"""The split by document: stable, disjoint, never empty on either side."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data.corpora import load_corpora
from lm.data.hashing import permutation, uniform
from lm.data.split import validation_mask

ids_of = st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=40, unique=True)


@given(ids_of, st.floats(0.001, 0.999), st.integers(0, 9))
def test_both_sides_have_a_document(ids, fraction, seed):
    mask = validation_mask(np.array(ids, np.uint64), fraction, seed)
    assert mask.any() and not mask.all()


def test_a_document_keeps_its_side_when_others_come_or_move():
    ids = np.random.default_rng(0).integers(0, 2**63, 2000).astype(np.uint64)
    mask = validation_mask(ids, 0.1, 0)
    assert 0.07 < mask.mean() < 0.13
    order = np.random.default_rng(1).permutation(2000)
    np.testing.assert_array_equal(validation_mask(ids[order], 0.1, 0), mask[order])
    np.testing.assert_array_equal(validation_mask(ids[:1000], 0.1, 0), mask[:1000])
    assert (validation_mask(ids, 0.1, 1) != mask).any()
    assert (validation_mask(ids, 0.2, 0) >= mask).all()


def test_equal_texts_stand_on_one_side():
    texts = tuple(f"text {i % 20}" for i in range(200))
    corpora = load_corpora({"source": "memory", "texts": texts, "validation_fraction": 0.3})
    (train,), (held,) = (list(side.values()) for side in (corpora.train, corpora.validation))
    content = train.corpus.table.content
    assert not set(content[train.documents]) & set(content[held.documents])
    assert len(train.documents) + len(held.documents) == 200


def test_a_source_of_its_own_for_validation_leaves_training_whole():
    corpora = load_corpora({"source": "memory", "texts": ("a", "b"), "validation": {"source": "memory",
                                                                                    "texts": ("c",)}})
    assert len(corpora.train["memory"].documents) == 2 and len(corpora.validation["validation"].documents) == 1


def test_zero_holds_out_nothing_and_one_document_cannot_be_divided():
    assert not validation_mask(np.arange(5, dtype=np.uint64), 0.0, 0).any()
    with pytest.raises(ValueError, match="1 document cannot be divided"):
        validation_mask(np.zeros(1, np.uint64), 0.1, 0)


def test_shuffles_are_pinned():
    """These values are part of the format of every run: a change here changes what resumed runs are fed."""
    assert permutation(8, 1, "rows", 2).tolist() == [7, 1, 6, 2, 3, 0, 5, 4]
    draws = uniform(permutation(10_000, 3).astype(np.uint64), 5)
    assert abs(draws.mean() - 0.5) < 0.01 and draws.min() >= 0 and draws.max() < 1
