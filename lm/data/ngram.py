"""An interpolated bigram, the baseline that a language model has to beat.

p(b | a) = w2 * count(a, b) / count(a) + w1 * count(b) / total + w0 / V. Where a was never seen as a context, w2 goes
to the unigram. Counts come from every (input, target) pair of the training split; the weights are fitted by EM (Jelinek
and Mercer 1980) on a tenth of it with counts from the other nine, never on validation data.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from lm.core.batch import Batch
from lm.data.loader import TokenDataset

_DENSE_VOCAB = 4096  # up to here the V x V table of counts is an array (134 MB), beyond it only pairs that occur
_HELD_OUT_EVERY = 10
_CHUNK = 4096


class Score(NamedTuple):
    """Of a set of targets: bits per UTF-8 byte, bits per token, and how many there were (weighted)."""

    bits_per_byte: float
    bits_per_token: float
    num_tokens: float
    num_bytes: float


class PairCounts:
    """How often each pair (a, b) and each b occurs; a pair is the number a * V + b."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self._dense = vocab_size, vocab_size <= _DENSE_VOCAB
        self._table = np.zeros(vocab_size**2 if self._dense else 0, np.int64)
        self._codes = np.zeros(0, np.int64)
        self._waiting: list[np.ndarray] = []
        self.context, self.unigram = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64)

    def add(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        codes = inputs.astype(np.int64) * self.vocab_size + targets
        self.context += np.bincount(inputs, minlength=self.vocab_size)
        self.unigram += np.bincount(targets, minlength=self.vocab_size)
        if self._dense:
            self._table += np.bincount(codes, minlength=self.vocab_size**2)
            return
        self._waiting.append(codes)
        if sum(map(len, self._waiting)) > max(len(self._codes), 1 << 22):
            self._merge()

    def _merge(self) -> None:
        # The sorted distinct pairs so far, and those that wait: counts are summed where they meet.
        fresh, counts = np.unique(np.concatenate(self._waiting), return_counts=True)
        both, where = np.unique(np.concatenate([self._codes, fresh]), return_inverse=True)
        self._table = np.bincount(where, np.concatenate([self._table, counts]), len(both)).astype(np.int64)
        self._codes, self._waiting = both, []

    def pair(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """How often each pair was added."""
        codes = inputs.astype(np.int64) * self.vocab_size + targets
        if self._dense:
            return self._table[codes]
        if self._waiting:
            self._merge()
        if not len(self._codes):
            return np.zeros(codes.shape, np.int64)
        at = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        return np.where(self._codes[at] == codes, self._table[at], 0)

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(inputs, targets, counts) of the distinct pairs."""
        if self._waiting:
            self._merge()
        codes = np.flatnonzero(self._table) if self._dense else self._codes
        return codes // self.vocab_size, codes % self.vocab_size, self._table[codes] if self._dense else self._table

    def components(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """[3, n]: bigram, unigram and uniform probability of each target; the bigram of an unseen context is the
        unigram."""
        unigram = self.unigram[targets] / max(int(self.unigram.sum()), 1)
        context = self.context[inputs]
        bigram = np.where(context > 0, self.pair(inputs, targets) / np.maximum(context, 1), unigram)
        return np.stack([bigram, unigram, np.full(len(targets), 1 / self.vocab_size)])


def fit_weights(components: np.ndarray, counts: np.ndarray, rounds: int = 50) -> np.ndarray:
    """[3] interpolation weights that maximise the likelihood of components [3, n], each seen counts [n] times, by EM
    from equal weights."""
    weights = np.full(len(components), 1 / len(components))
    for _ in range(rounds):
        share = weights[:, None] * components
        weights = (share / share.sum(0) * counts).sum(1)
        weights /= weights.sum()
    return weights


class Bigram:
    """counts: over the whole training split. weights: [3] of bigram, unigram and uniform, summing to 1."""

    def __init__(self, counts: PairCounts, weights: np.ndarray) -> None:
        self.counts, self.weights = counts, weights

    def log2_prob(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """log2 p(target | input), same shape as the two, float64."""
        flat = self.counts.components(np.ravel(inputs), np.ravel(targets))
        return np.log2(self.weights @ flat).reshape(np.shape(inputs))

    def score(self, batches: Iterable[Batch], token_bytes: np.ndarray) -> Score:
        """Bits on exactly the targets of the batches that have weight, as a model is evaluated on them."""
        bits = tokens = size = 0.0
        for batch in batches:
            at = batch.weights > 0
            weights, targets = batch.weights[at].astype(np.float64), batch.targets[at]
            bits -= float(weights @ self.log2_prob(batch.tokens[at], targets))
            tokens += float(weights.sum())
            size += float(weights @ token_bytes[targets])
        if not tokens:
            raise ValueError("there is no target to score: the batches hold no position with weight above 0")
        return Score(bits / max(size, 1e-12), bits / tokens, tokens, size)


def fit_bigram(dataset: TokenDataset) -> Bigram:
    """The interpolated bigram of a training split. Raises ValueError for a split without any target."""
    vocab_size = dataset.tokenizer.vocab_size
    everything, most = PairCounts(vocab_size), PairCounts(vocab_size)
    held = PairCounts(vocab_size)
    for inputs, targets in dataset.target_blocks():
        everything.add(inputs, targets)
        # Every tenth run of 4096 pairs is held out: near-contiguous text, from all over the split.
        out = (np.arange(len(inputs)) // min(_CHUNK, max(1, len(inputs) // _HELD_OUT_EVERY))) % _HELD_OUT_EVERY == 0
        held.add(inputs[out], targets[out])
        most.add(inputs[~out], targets[~out])
    if not int(everything.unigram.sum()):
        raise ValueError("the training split has no target to count; its documents are single tokens")
    inputs, targets, counts = held.pairs()
    return Bigram(everything, fit_weights(most.components(inputs, targets), counts))
