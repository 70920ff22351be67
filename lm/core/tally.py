"""Sums that layers take over the tokens of a call, and what becomes of them once a step.

A tally adds up over microbatches, forward passes and devices. It is a result (`Output.aux["tally"]`), never a gradient.
Once a step it is settled: metrics are computed from the sums over the whole batch, and the running statistics, the
`stats` collection of the model's variables, move on. Both trees have the names of the layers; tallies of the layers of
a repeated pattern are stacked on a leading axis, as their parameters are.

Shapes, one layer's: F features, N experts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.depth import layer_names
from lm.core.types import Array, Mean

_static = lambda: dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """count []: tokens; total, square [F]: sums of their features and of the squares. momentum: of the averages.

    Its statistics are `mean` and `var` [F], moving averages over the steps, and `steps` [], how many were averaged: the
    first of them count alike, until 1 / steps is below 1 - momentum.
    """

    count: Array
    total: Array
    square: Array
    momentum: float = _static()

    @classmethod
    def of(cls, features: Array, present: Array, momentum: float) -> "Moments":
        """Of features [..., F] float32 where present [...]."""
        here = present[..., None] != 0
        features = jnp.where(here, features, 0)
        over = tuple(range(features.ndim - 1))
        return cls(jnp.sum(here[..., 0], dtype=features.dtype), jnp.sum(features, over),
                   jnp.sum(jnp.square(features), over), momentum)

    def mean_and_var(self) -> tuple[Array, Array]:
        """Of the tokens that were counted, [F]; 0 and 0 of none."""
        count = jnp.maximum(self.count, 1)[..., None]
        mean = self.total / count
        return mean, jnp.maximum(self.square / count - jnp.square(mean), 0)

    def settle(self, stats: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """(statistics after the step, metrics)."""
        mean, var = self.mean_and_var()
        seen = self.count > 0
        share = jnp.where(seen, jnp.maximum(1 - self.momentum, 1 / (stats["steps"] + 1)), 0)[..., None]
        return {"mean": stats["mean"] + share * (mean - stats["mean"]),
                "var": stats["var"] + share * (var - stats["var"]), "steps": stats["steps"] + seen}, {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Usage:
    """scores [N]: sums of the router's weights of each expert, 0 where it was never chosen.

    Metrics, as in He 2024 (section 3.4), with z = scores / sum(scores): `usage`, the share of experts with z > 0;
    `unevenness`, log N + sum z log z, the divergence of z from uniform in nats; and `dead`, the share of experts that
    no token has chosen for `window` steps. Its statistic is `idle` [N], steps since an expert was last chosen, float32.
    """

    scores: Array
    window: int = _static()

    def settle(self, stats: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """(statistics after the step, metrics)."""
        used = self.scores > 0
        idle = jnp.where(used, 0, stats["idle"] + 1)
        return {"idle": idle}, {"usage": jnp.mean(used, -1, dtype=jnp.float32), "unevenness": unevenness(self.scores),
                                "dead": jnp.mean(idle >= self.window, -1, dtype=jnp.float32)}


def unevenness(scores: Array) -> Array:
    """log N + sum z log z over the last axis of scores [..., N] >= 0, z = scores / their sum; 0 where all are 0."""
    total = jnp.sum(scores, -1, keepdims=True)
    z = scores / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(jnp.where(z > 0, z * jnp.log(jnp.where(z > 0, z, 1)), 0), -1)
    return jnp.where(total[..., 0] > 0, jnp.log(scores.shape[-1]) - entropy, 0)


def _is_tally(node: Any) -> bool:
    return isinstance(node, (Moments, Usage, Mean))


def settle(stats: Mapping[str, Any], tally: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Array]]:
    """(the `stats` collection after a step with these sums, metrics by name, [R] where layers are stacked)."""
    after, metrics = dict(stats), {}
    for name, node in tally.items():
        if isinstance(node, Mean):
            metrics[name] = node.value
        elif _is_tally(node):
            after[name], found = node.settle(stats[name])
            metrics |= found
        else:
            below, found = settle(stats.get(name, {}), node)
            metrics |= {f"{name}/{metric}": value for metric, value in found.items()}
            if below:
                after[name] = below
    return after, metrics


def by_layer(metrics: Mapping[str, Array], params: Mapping[str, Any]) -> dict[str, Array]:
    """The metrics of `settle` one a layer, `layer_<depth>/<rest>`. params: every leaf of the model by its name, from
    which the depths are counted."""
    places = layer_names({**params, **metrics})
    return {layer.replace("stack/", "", 1): metrics[name] if index is None else metrics[name][index]
            for name in metrics for layer, index in places[name]}
