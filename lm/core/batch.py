"""The batch that the data pipeline makes and the train step reads.

Imports numpy only: data workers never touch a device.

Shapes: B batch rows, T time.
"""

from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of packed documents, one token position predicting the next.

    Fields, each [B, T]:
      tokens: int32 inputs.
      targets: int32, the token after each input; undefined where `weights` is 0.
      weights: float32 loss weight of each target; 0 where nothing is to be predicted (padding, last token of a
        document, masked prompt). Losses are sums over weights, so any mask composes with any loss.
      segment_ids: int32, document number in the row from 1; 0 marks padding.
      positions: int32, position inside the document; 0 exactly where a document (or the padding tail) starts, so that
        `positions == 0` is the reset of every recurrent state.
    """

    tokens: Any
    targets: Any
    weights: Any
    segment_ids: Any
    positions: Any

    @property
    def reset(self):
        """[B, T] bool: a document starts here."""
        return self.positions == 0

    @property
    def present(self):
        """[B, T] bool: a real token, not padding."""
        return self.segment_ids != 0


class MaskedBatch(NamedTuple):
    """A training batch out of which a mask took targets: the fields of `Batch`, in which those have weight 0, and
    `dropped`, [B, T] float32, the weight that each had."""

    tokens: Any
    targets: Any
    weights: Any
    segment_ids: Any
    positions: Any
    dropped: Any

    reset = Batch.reset
    present = Batch.present


class ReferencedBatch(NamedTuple):
    """A batch that brings what another model thinks of it: the fields of `Batch`, and `reference`, [B, T] float32, the
    log-probability of each target under that model; undefined where `weights` is 0."""

    tokens: Any
    targets: Any
    weights: Any
    segment_ids: Any
    positions: Any
    reference: Any

    reset = Batch.reset
    present = Batch.present


class TaughtBatch(NamedTuple):
    """A training batch with what a teacher predicts: the fields of `Batch`; `teacher_ids`, [B, T, k] int32, the
    teacher's most probable tokens at each target; `teacher_logp`, [B, T, k + 1] float32, its log-probabilities of these
    and of all others together. Both are of no meaning where the weight is 0."""

    tokens: Any
    targets: Any
    weights: Any
    segment_ids: Any
    positions: Any
    teacher_ids: Any
    teacher_logp: Any

    reset = Batch.reset
    present = Batch.present


def batch_spec(batch_size: int, seq_len: int) -> Batch:
    """Shapes and dtypes of a batch, as zero-cost numpy placeholders for tracing and for contract tests."""
    shape = (batch_size, seq_len)
    ints, floats = np.broadcast_to(np.int32(0), shape), np.broadcast_to(np.float32(0), shape)
    return Batch(tokens=ints, targets=ints, weights=floats, segment_ids=ints, positions=ints)
