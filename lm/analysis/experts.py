"""Which tokens choose an expert, and how evenly experts are used: for layers that retrieve by product keys.

Shape legend: B batch, T time, H heads, k rows a head, N rows.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lm.core.batch import Batch
from lm.core.tally import unevenness
from lm.core.types import Array, Params
from lm.layers.experts.by_product_keys import ByProductKeys
from lm.layers.experts.product_keys import choose


class Choices(NamedTuple):
    """One layer's: its name `layer_<depth>/<name>`, ids [B, T, H, k], -1 for padding, and gates alike."""

    layer: str
    ids: np.ndarray
    gates: np.ndarray


class Place(NamedTuple):
    """A token that chose an expert, and with what weight, over all heads: row and position in it, the row's tokens."""

    weight: float
    row: int
    position: int
    tokens: np.ndarray


@dataclasses.dataclass
class LayerUse:
    """What was found of a layer. scores [N]: sums of weights. tokens [N]: how many chose it. places: for each expert
    that was asked about, its best places, best first."""

    scores: np.ndarray
    tokens: np.ndarray
    places: dict[int, list[Place]]

    @property
    def usage(self) -> float:
        """Share of experts that a token chose."""
        return float(np.mean(self.scores > 0))

    @property
    def unevenness(self) -> float:
        """Divergence of the weights from uniform over experts, in nats."""
        return float(unevenness(jnp.asarray(self.scores)))


def layers_with_experts(model: nn.Module) -> dict[str, int]:
    """`layer_<depth>/<name>` of every layer that retrieves by product keys to its number of rows."""
    return {name: layer.num_rows for name, layer in _all_layers(model) if isinstance(layer, ByProductKeys)}


def _all_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    stack = model.stack
    blocks = [*stack.prefix, *[block for _ in range(stack.repeats) for block in stack.pattern]]
    return [(f"layer_{depth}/{name}", layer) for depth, block in enumerate(blocks)
            for name, layer in zip(block.names, block.layers, strict=True)]


def choices(model: nn.Module, params: Params, batch: Batch) -> list[Choices]:
    """What every such layer chose for the tokens of a batch, in order of depth; the model as in evaluation.

    model: with an unrolled stack (`scan=False`).
    """
    names = list(layers_with_experts(model))
    found = _found(model, params, batch)
    return [Choices(name, np.asarray(ids), np.asarray(gates)) for name, (ids, gates) in zip(names, found, strict=True)]


def _run(model: nn.Module, params: Params, batch: Batch) -> list[tuple[Array, Array]]:
    found = []

    def intercept(call, args, kwargs, context):
        module = context.module
        if isinstance(module, ByProductKeys) and context.method_name == "__call__":
            x, _, ctx = args
            router = module.router(x.shape[-1])
            arrays = router.apply({name: part["router"] for name, part in module.variables.items() if "router" in part},
                                  x.shape[-1])
            found.append(choose(x, ctx.weights, arrays, router)[:2])
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        model.apply(params, batch.tokens, reset=batch.reset, positions=batch.positions, weights=batch.present)
    return found


_found = jax.jit(_run, static_argnums=0)


def use(model: nn.Module, params: Params, batches: Iterable[Batch], asked: Mapping[str, Sequence[int]],
        count: int) -> dict[str, LayerUse]:
    """What layers chose over the batches. asked: each layer's experts whose `count` best places are kept."""
    rows = layers_with_experts(model)
    out = {name: LayerUse(np.zeros(rows[name]), np.zeros(rows[name], np.int64), {expert: [] for expert in experts})
           for name, experts in asked.items()}
    first = 0
    for batch in batches:
        for layer, ids, gates in choices(model, params, batch):
            if layer in out:
                _add(out[layer], ids, gates, batch.tokens, first, count)
        first += len(batch.tokens)
    return out


def _add(found: LayerUse, ids: np.ndarray, gates: np.ndarray, tokens: np.ndarray, first: int, count: int) -> None:
    B, T = ids.shape[:2]
    flat, weights = ids.reshape(B * T, -1), gates.reshape(B * T, -1)
    here = flat >= 0
    np.add.at(found.scores, flat[here], weights[here])
    token = np.broadcast_to(np.arange(B * T)[:, None], flat.shape)
    pairs = np.unique(np.stack([flat[here], token[here]]), axis=1)  # two heads of a token count once
    np.add.at(found.tokens, pairs[0], 1)
    for expert, best in found.places.items():
        total = np.sum(np.where(flat == expert, weights, 0), 1)
        new = [Place(float(total[at]), first + int(at) // T, int(at) % T, tokens[at // T])
               for at in np.argsort(-total, kind="stable")[:count] if total[at] > 0]
        found.places[expert] = sorted([*best, *new], key=lambda place: -place.weight)[:count]
