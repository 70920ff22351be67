"""What an evaluation is: a function that yields names and values."""

from collections.abc import Callable, Iterable, Iterator

from lm.core.types import Apply, Key, Params

# Called with the model and its variables; yields ("eval/<set>/<metric>", value). `key` is for evaluations that draw at
# random, and None otherwise.
Evaluator = Callable[[Apply, Params, Key | None], Iterator[tuple[str, float]]]


def evaluate(evaluators: Iterable[Evaluator], apply: Apply, params: Params, key: Key | None = None) -> dict[str, float]:
    """Every metric of every evaluator. Raises ValueError where two give the same name."""
    out: dict[str, float] = {}
    for evaluator in evaluators:
        for name, value in evaluator(apply, params, key):
            if name in out:
                raise ValueError(f"two evaluators give {name!r}; name their sets differently")
            out[name] = value
    return out


def by_set(metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    """"eval/<set>/<metric>": value as {set: {metric: value}}, in the order of the names; other names are left out."""
    out: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        parts = name.split("/")
        if len(parts) == 3 and parts[0] == "eval":
            out.setdefault(parts[1], {})[parts[2]] = value
    return out
