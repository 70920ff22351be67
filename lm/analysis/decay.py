"""How fast each channel of a recurrent layer forgets, by layer: what RWKV's paper shows in its appendix."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lm.core.depth import layer_names
from lm.core.tree import named_leaves

# What a layer's parameter `decay` means, as the factor that is left of the past after one token. Of RWKV-6 and 7, whose
# decays depend on the token, the part that does not.
FACTORS = {
    "rwkv4": lambda decay: np.exp(-np.exp(decay)),
    "rwkv5": lambda decay: np.exp(-np.exp(decay)),
    "rwkv6": lambda decay: np.exp(-np.exp(decay)),
    "rwkv7": lambda decay: np.exp(-np.exp(-0.5) / (1 + np.exp(-decay))),
}


class Curve(NamedTuple):
    """depth of the layer; its kind; factors a token of its channels, sorted upward, float64 [channels]."""

    depth: int
    kind: str
    factors: np.ndarray


def decay_curves(params: Any, model: Mapping[str, Any]) -> list[Curve]:
    """A curve for each layer that has decays, in order of depth (Peng et al. 2023, appendix on time decays).

    params: variables as a checkpoint holds them. model: the resolved `model` group, whose entries say what kind of
    layer a name is. Raises ValueError where no layer has decays.
    """
    leaves = named_leaves(params)
    found = []
    for name, places in layer_names(leaves).items():
        *_, layer, leaf = name.split("/")
        entry = layer if layer in model else layer.rpartition("_")[0]  # of two in a block the second is called name_1
        kind = model.get(entry, {}).get("kind", entry) if isinstance(model.get(entry), Mapping) else entry
        if leaf != "decay" or kind not in FACTORS:
            continue
        for place, index in places:
            depth = int(place.split("layer_")[1].split("/")[0])
            values = np.asarray(leaves[name] if index is None else leaves[name][index], np.float64)
            found.append(Curve(depth, kind, np.sort(FACTORS[kind](values), axis=None)))
    if not found:
        raise ValueError(f"no layer of this model has decays; those that have: {', '.join(FACTORS)}")
    return sorted(found, key=lambda curve: curve.depth)
