"""What generation gives back."""

import dataclasses
from typing import Literal

import numpy as np

FinishReason = Literal["length", "eos", "stop"]


@dataclasses.dataclass(frozen=True)
class Generation:
    """The continuation of one prompt.

    tokens: [n] int32, every token that was drawn: with a stop token at the end where that ended it ("eos"), and up to
      the token that completed a stop string ("stop"). text: what they say, without the stop token and cut exactly
      before the stop string; None where no decoder was given. finish_reason: "length" is `max_new_tokens`.
    """

    tokens: np.ndarray
    text: str | None
    finish_reason: FinishReason


@dataclasses.dataclass
class Timing:
    """Seconds on the clock and what was done in them; compilation is counted apart.

    prefill_tokens: real prompt tokens, padding not counted. decode_tokens: new tokens but the first of each row, which
    the prefill gives. state_bytes: size of what the model remembers of all rows. drafted, kept: tokens of drafts, and
    those of them that verification kept.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    state_bytes: int = 0
    drafted: int = 0
    kept: int = 0

    def __add__(self, other: "Timing") -> "Timing":
        """Both batches, one after the other: everything adds up but the state, of which the larger counts."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)}
        return Timing(**{**sums, "state_bytes": max(self.state_bytes, other.state_bytes)})

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second over all rows; 0 where there was nothing to time."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens a second over all rows; 0 where there was nothing to time."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclasses.dataclass(frozen=True)
class Generated:
    """One `Generation` a prompt, in order, and the timing of the batch."""

    rows: list[Generation]
    timing: Timing
