"""What a ladder is: the sizes, how long each is trained, and what is to be told of them.

As data, from an experiment's `scale()`, over which flags of the command line have the last word:

    {"sizes": {"model.embed_dim,model.num_layers": [(32, 2), (48, 2), (64, 3), (96, 4)]}, "next": [(128, 5)],
     "tokens_per_parameter": [20], "seeds": [0, 1]}
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from launch.sweeps.space import Parameter, read_space, text_of
from lm.core.fields import build, check_known, option

COUNTS = ("all", "body")


@dataclasses.dataclass(frozen=True)
class Definition:
    """The fields of `scale()`. Each size is trained for every ratio of `tokens_per_parameter` and every budget of
    `flops`, once a seed."""

    sizes: dict[str, Any] = option({}, "field, or fields with commas between, to its values, one a size")
    next: tuple[Any, ...] = option((), "values like those of sizes, whose loss is predicted")
    tokens_per_parameter: tuple[float, ...] = option((), "ratios D / N that every size is trained at")
    flops: tuple[float, ...] = option((), "budgets of training FLOPs that every size is trained with")
    seeds: tuple[int, ...] = option((0,), "values of train.seed")
    count: str = option("all", "what N counts: all parameters, or body: without embedding, positions and head")
    metric: str = option("eval/validation/loss", "the loss, a number of final_result.json")
    level: float = option(0.9, "share of the resampled fits that an interval holds")
    resamples: int = option(300, "how often the runs are drawn again")

    @property
    def parameter(self) -> Parameter:
        """What varies."""
        return read_space(self.sizes)[0]

    def check(self) -> None:
        """Raises ValueError for what is no ladder."""
        if len(self.sizes) != 1:
            raise ValueError(f"a ladder has one list of sizes: --param model.embed_dim=32,48,64, or several fields "
                             f"together, --param model.embed_dim,model.num_layers=(32,2),(48,2); got "
                             f"{len(self.sizes)}: {', '.join(self.sizes) or 'none'}")
        if self.parameter.values is None:
            raise ValueError(f"the sizes of a ladder are a list of values; {self.parameter.name} is a range")
        if not self.tokens_per_parameter and not self.flops:
            raise ValueError("how long is each size trained? Give --tokens-per-parameter 20, or budgets as --flops "
                             "1e13,1e14")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds={self.seeds} must be at least one number, each once")
        for name in ("tokens_per_parameter", "flops"):
            if any(not value > 0 for value in getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        check_known([self.count], COUNTS, "lm scale", "--count")
        if not 0 < self.level < 1 or self.resamples < 1:
            raise ValueError(f"--level={self.level} must be between 0 and 1, and --resamples={self.resamples} at least "
                             f"1")
        labels = [label(value) for value in (*self.parameter.values, *self.next)]
        if twice := sorted({one for one in labels if labels.count(one) > 1}):
            raise ValueError(f"size {twice[0]} is given twice, among sizes and next")
        wrong = [value for value in self.next if len(self.values_of(value)) != len(self.parameter.paths)]
        if wrong:
            raise ValueError(f"--next={wrong[0]} must be like the sizes: {len(self.parameter.paths)} values, of "
                             f"{self.parameter.name}")

    def values_of(self, value: Any) -> tuple[Any, ...]:
        """A value as one a path."""
        several = len(self.parameter.paths) > 1
        return tuple(value) if several and isinstance(value, (list, tuple)) else (value,)

    def overrides(self, value: Any) -> list[tuple[str, str]]:
        """The config of one size."""
        return [(path, text_of(tuple(one) if isinstance(one, list) else one))
                for path, one in zip(self.parameter.paths, self.values_of(value), strict=True)]


def label(value: Any) -> str:
    """A size as part of the name of a folder: 64, 64x2."""
    parts = value if isinstance(value, (list, tuple)) else (value,)
    return "x".join(re.sub(r"[^\w.+-]+", "_", str(part)).strip("_") for part in parts)


def from_data(given: Mapping[str, Any], where: str) -> Definition:
    """A definition of plain data, checked. Raises ValueError naming `where`."""
    check_known(given, [field.name for field in dataclasses.fields(Definition)], where, "entry")
    given = dict(given)
    for name in ("tokens_per_parameter", "flops"):  # 20 for 20.0, and one number for a list of one
        if name in given:
            value = given[name] if isinstance(given[name], (list, tuple)) else (given[name],)
            given[name] = [float(one) if isinstance(one, (int, float)) else one for one in value]
    return build(Definition, json.loads(json.dumps(given)), where)
