"""Was a text in the training data? Scores of single texts, and how well they tell members from controls.

Every score is lower for texts that a model knows. n texts; numpy only.
"""

import math
import zlib
from collections.abc import Sequence

import numpy as np

FALSE_POSITIVES = 0.01  # at which the true positives are reported


def mean_loss(nats: np.ndarray) -> float:
    """Nats a token (Yeom et al. 2018). nats: [tokens] of one text."""
    return float(nats.mean())


def zlib_ratio(nats: np.ndarray, text: str) -> float:
    """Nats of the text over its bytes after compression: texts that are simple anyway have few of both (Carlini et al.
    2021)."""
    return float(nats.sum()) / len(zlib.compress(text.encode("utf-8"), 9))


def reference_ratio(nats: np.ndarray, reference: np.ndarray) -> float:
    """Nats of the text over those under a model that was not trained on it (Carlini et al. 2021). The models may have
    different tokens."""
    return float(nats.sum()) / max(float(reference.sum()), 1e-9)


def min_k(nats: np.ndarray, share: float) -> float:
    """Mean nats of the `share` of tokens that are least probable, at least one (Min-K% Prob, Shi et al. 2024)."""
    count = max(1, math.ceil(share * len(nats)))
    return float(np.sort(nats)[-count:].mean())


def auc(members: Sequence[float], controls: Sequence[float]) -> float:
    """Probability that a member scores below a control, ties counting half: the area under the ROC curve."""
    a, b = np.asarray(members, np.float64), np.sort(np.asarray(controls, np.float64))
    above = len(b) - np.searchsorted(b, a, "right")
    ties = np.searchsorted(b, a, "right") - np.searchsorted(b, a, "left")
    return float((above + ties / 2).mean() / len(b))


def roc(members: Sequence[float], controls: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(false, true) positive rates of "below or at the threshold", for every threshold that changes one, from 0, 0."""
    thresholds = np.unique(np.concatenate([members, controls]))
    rate = lambda scores: np.searchsorted(np.sort(np.asarray(scores, np.float64)), thresholds, "right") / len(scores)
    return np.concatenate([[0.0], rate(controls)]), np.concatenate([[0.0], rate(members)])


def true_positives(members: Sequence[float], controls: Sequence[float], false_positives: float = FALSE_POSITIVES
                   ) -> float:
    """The largest share of members that a threshold finds while it takes at most this share of the controls.

    With fewer controls than 1 / false_positives, no control may be taken.
    """
    false, true = roc(members, controls)
    return float(true[false <= false_positives].max())


def exposure(member: float, controls: Sequence[float]) -> float:
    """Exposure of a canary in bits: log2 of how many times better its rank among the controls is than the last one,
    log2(n + 1) - log2(rank) with n controls (Carlini et al. 2019, section 4.2, over n + 1 samples). 0 is the last rank,
    log2(n + 1) the first; 1.44 is expected of a text that was not trained on. Ties rank in the middle."""
    scores = np.asarray(controls, np.float64)
    rank = 1 + (scores < member).sum() + (scores == member).sum() / 2
    return math.log2(len(scores) + 1) - math.log2(rank)
