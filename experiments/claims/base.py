"""What the checks of claims share: results by arm, criteria with a limit, and a small model's training config."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments import base

SEEDS = (0, 1, 2)


def get_config() -> ConfigDict:
    """Groups that small runs share: float32, unrolled layers, AdamW without decay, no samples, one checkpoint."""
    config = base.get_config()
    config.optimizer = dict(name="adamw", learning_rate=3e-3, schedule="cosine", final_fraction=0.05, warmup_steps=20,
                            weight_decay=0.0, b2=0.99)
    config.checkpoint = dict(every=500, keep=1)
    config.eval = dict(every=100_000, batches=8, baseline=False)
    config.log = dict(every=50, tensorboard=False)
    return config


def small(**model: Any) -> dict[str, Any]:
    """A `model` group for tens of ids and two cores."""
    return {"dtype": "float32", "scan": False, "tie_embeddings": False, "vocab_multiple": 8, **model}


def by_arm(results: Iterable[Mapping[str, Any]], metric: str) -> dict[str, list[float]]:
    """arm -> the metric of each seed. Raises KeyError where a result lacks it."""
    out: dict[str, list[float]] = {}
    for result in results:
        out.setdefault(result["arm"], []).append(float(result["values"][metric]))
    return out


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return math.fsum(values) / len(values)


def at_least(what: str, value: float, limit: float) -> dict[str, Any]:
    """A criterion: value >= limit."""
    return {"what": what, "value": value, "limit": f">= {limit:g}", "passed": value >= limit}


def at_most(what: str, value: float, limit: float) -> dict[str, Any]:
    """A criterion: value <= limit."""
    return {"what": what, "value": value, "limit": f"<= {limit:g}", "passed": value <= limit}


def verdict(criteria: Sequence[Mapping[str, Any]], metrics: Sequence[str], figure: Mapping[str, Any]) -> dict[str, Any]:
    """What `check` returns: it passes where every criterion does. metrics: shown by arm. figure: as
    `lm.claims.figure.draw` takes it."""
    return {"passed": all(c["passed"] for c in criteria), "criteria": list(criteria), "metrics": list(metrics),
            "figure": dict(figure)}
