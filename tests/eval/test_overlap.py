"""Overlap of sequences against recursion and enumeration."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.eval.overlap import common_subsequence, common_substring, rouge_l, words

items = st.lists(st.integers(0, 3), max_size=9)


@given(items, items)
def test_common_subsequence_equals_the_recursion(a, b):
    @functools.cache
    def longest(i, j):
        if i == len(a) or j == len(b):
            return 0
        return 1 + longest(i + 1, j + 1) if a[i] == b[j] else max(longest(i + 1, j), longest(i, j + 1))
    assert common_subsequence(a, b) == longest(0, 0)


@given(items, items)
def test_common_substring_equals_enumeration(a, b):
    runs = {tuple(b[i:j]) for i in range(len(b) + 1) for j in range(i, len(b) + 1)}
    want = max(j - i for i in range(len(a) + 1) for j in range(i, len(a) + 1) if tuple(a[i:j]) in runs)
    assert common_substring(a, b) == want


def test_rouge_l_by_hand():
    """The example of Lin (2004), section 3.1: "police killed the gunman" and "police kill the gunman" share 3 of 4."""
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    assert rouge_l("The cat, sat.", "the CAT sat") == 1.0 and rouge_l("a b", "c d") == 0.0
    assert rouge_l("a b c d", "a c") == pytest.approx(2 * 2 / 6)


def test_texts_without_words():
    assert rouge_l("...", "...") == 1.0 and rouge_l("...", "!!!") == 0.0 and rouge_l("", "word") == 0.0
    assert words("Größe_9, naïve") == ["größe", "9", "naïve"]


def test_rouge_l_equals_the_package_where_it_is_installed():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="needs rouge-score").RougeScorer(["rougeL"])
    for a, b in (("the quick brown fox", "the brown quick dog"), ("1 2 3 4", "2 4 5"), ("a", "b")):
        assert rouge_l(a, b) == pytest.approx(scorer.score(a, b)["rougeL"].fmeasure)
