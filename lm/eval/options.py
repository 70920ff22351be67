"""The group `eval` of a config: when a run is evaluated, on what, and what it writes to show for it."""

import dataclasses
from collections.abc import Mapping

from lm.core.fields import build, option
from lm.core.recurrences import check_recurrences
from lm.eval.memorization_options import MemorizationOptions
from lm.generate.sampling import SamplingOptions

VALIDATION = "validation"  # name of the split that every run is evaluated on


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Evaluation and samples during training; `lm eval` and `lm generate` do the same for a finished run."""

    every: int = option(500, "steps between evaluations")
    final: bool = option(True, "evaluate after the last step, whatever `every` says")
    batches: int | None = option(None, "at most this many batches of each set; None for all of them")
    seq_len: int | None = option(None, "tokens of a row of the validation split and of `sets`; None is train.seq_len")
    sets: Mapping[str, str] = option({}, "further sets besides the validation split: name to text file or folder")
    baseline: bool = option(True, "print an interpolated bigram, fitted on the training split, beside bits per byte")
    recurrences: tuple[int, ...] = option((), "a model of recurrent depth is also evaluated with these numbers of "
                                              "iterations, as sets <set>_r<number>")
    memorization: dict = option({}, "texts that were trained on, matched controls, and lengths: fields of a "
                                    "memorization test, see docs/memorization.md; {} makes none")
    samples: tuple[str, ...] = option((), "prompts that are continued at each evaluation; () writes no samples")
    sample_tokens: int = option(128, "new tokens of a sample")
    sample_seed: int = option(0, "seed of the samples, the same at every evaluation")
    temperature: float = option(0.8, "of the samples; 0 is greedy")
    top_k: int | None = option(None, "samples come from the top_k most probable tokens; None for all")
    top_p: float | None = option(None, "samples come from the fewest tokens that make this probability; None for all")
    min_p: float | None = option(None, "samples come from tokens at least min_p times as probable as the best")

    def check(self) -> None:
        """Raises ValueError for values out of range."""
        for name in ("every", "sample_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"config.eval.{name}={getattr(self, name)} must be at least 1")
        if self.batches is not None and self.batches < 1:
            raise ValueError(f"config.eval.batches={self.batches} must be at least 1, or None for all")
        if self.seq_len is not None and self.seq_len < 1:
            raise ValueError(f"config.eval.seq_len={self.seq_len} must be at least 1, or None for train.seq_len")
        for count in self.recurrences:
            check_recurrences(count, "config.eval.recurrences")
        if bad := [name for name in self.sets if not name or "/" in name or name == VALIDATION]:
            raise ValueError(f"config.eval.sets has the name {bad[0]!r}; a name is not empty, has no '/', and "
                             f"{VALIDATION!r} is the split of the training data")
        if self.memorization:
            build(MemorizationOptions, self.memorization, "config.eval.memorization")
        try:
            self.sampling.check()
        except ValueError as error:
            raise ValueError(f"config.eval: {error}") from None

    @property
    def sampling(self) -> SamplingOptions:
        """How samples are drawn."""
        return SamplingOptions(self.temperature, self.top_k, self.top_p, self.min_p)
