"""What a memorization test is asked to do."""

import dataclasses

from lm.core.fields import option


@dataclasses.dataclass(frozen=True)
class MemorizationOptions:
    """Texts and lengths of a memorization test; it runs at every evaluation where they are given. `lm eval --task
    memorization` takes the same."""

    members: str | None = option(None, "texts that were trained on: a text, JSONL or parquet file, folder or glob; "
                                       "None where the data are made rows that come with them (recital)")
    controls: str | None = option(None, "texts of the same kind that were not: required with members, since no number "
                                        "says anything without them")
    prefix: int | None = option(None, "tokens that the model is given; None is all before the suffix")
    suffix: int = option(50, "tokens at the end of a text that it has to continue with")
    beams: int | None = option(None, "width of the beam search attack, such as 30; None is greedy decoding alone")
    min_k: float = option(0.2, "share of the least probable tokens that Min-K% looks at")
    limit: int | None = option(None, "at most this many texts of each kind; None for all")
    batch_size: int = option(16, "texts at a time")

    def check(self, where: str = "config.eval.memorization") -> None:
        """Raises ValueError for members without controls, and lengths that are none."""
        if (self.members is None) != (self.controls is None):
            there, missing = ("members", "controls") if self.controls is None else ("controls", "members")
            raise ValueError(f"{where} has {there} and no {missing}: what a model says about texts that it was trained "
                             f"on means nothing without matched texts that it was not; give both")
        for name in ("prefix", "suffix", "beams", "limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{where}.{name}={value} must be at least 1"
                                 + ("" if name in ("suffix", "batch_size") else ", or None"))
        if not 0 < self.min_k <= 1:
            raise ValueError(f"{where}.min_k={self.min_k} must be above 0 and at most 1")
