"""What a row of pairs is made of: groups of documents with one prompt, and how much of each fits.

Legend: N documents, G groups, T seq_len, K = 3 kinds. A document's inputs are all its tokens but the last.
"""

from typing import NamedTuple

import numpy as np

from lm.data.hashing import permutation
from lm.data.preference.examples import CHOSEN, MISMATCHED, REJECTED

KINDS = 3
TOO_LONG = ("cut", "skip", "refuse")


class Groups(NamedTuple):
    """record: [G] int64, number of the record. document: [G, K], the document whose response stands there, -1 for
    none. prompt_of: [G, K], the document whose prompt does. drop: [G, K], tokens cut off the start of that prompt.
    inputs: [G], inputs of all its documents together."""

    record: np.ndarray
    document: np.ndarray
    prompt_of: np.ndarray
    drop: np.ndarray
    inputs: np.ndarray


def group(record: np.ndarray, kind: np.ndarray, documents: np.ndarray, *, mismatched: bool, key: int
          ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(record [G], document [G, K], prompt_of [G, K]) of the `documents` of a split. record, kind: [N] of all.

    mismatched: the response of each group, the chosen one where there is one, also stands behind the prompt of another
    group, which `key` picks; not where there is no other.
    """
    records, where = np.unique(record[documents], return_inverse=True)
    document = np.full((len(records), KINDS), -1, np.int64)
    document[where, kind[documents]] = documents
    prompt_of = document.copy()
    if mismatched and len(records) > 1:
        order = permutation(len(records), key, "mismatched")
        following = np.empty_like(order)
        following[order] = np.roll(order, -1)
        own = np.where(document[:, CHOSEN] >= 0, document[:, CHOSEN], document[:, REJECTED])
        document[:, MISMATCHED], prompt_of[:, MISMATCHED] = own, own[following]
    return records, document, prompt_of


def fit(record: np.ndarray, document: np.ndarray, prompt_of: np.ndarray, num_tokens: np.ndarray, prompts: np.ndarray,
        seq_len: int) -> tuple[Groups, np.ndarray, np.ndarray]:
    """(groups that fit a row, [G] bool: prompt cut, [G] bool: responses alone are too long, both over all G).

    num_tokens, prompts: [N], tokens of each document and of its prompt. What is too long loses the start of its
    prompts, equally much is left of each; the last token of a prompt and all of a response stay.
    """
    there = document >= 0
    at = np.maximum(document, 0)
    response = np.where(there, num_tokens[at] - prompts[at], 0)
    prompt = np.where(there, prompts[np.maximum(prompt_of, 0)], 0)
    room = seq_len - np.where(there, response - 1, 0).sum(1)
    share = room // np.maximum(there.sum(1), 1)
    long = prompt.sum(1) > room
    kept = np.where(long[:, None], np.minimum(prompt, share[:, None]), prompt)
    fits = share >= 1
    inputs = np.where(there, kept + response - 1, 0).sum(1)
    groups = Groups(record[fits], document[fits], prompt_of[fits], (prompt - kept)[fits], inputs[fits])
    return groups, long & fits, ~fits
