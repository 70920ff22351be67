"""Names of parameters by the depth of their layer, whether it is stored in a prefix or in a repeated pattern."""

import re
from collections.abc import Mapping
from typing import Any

_BLOCK = re.compile(r"(?P<head>.*?\bstack/)(?P<kind>prefix|pattern)_(?P<number>\d+)/(?P<rest>.*)")


def layer_names(names: Mapping[str, Any]) -> dict[str, list[tuple[str, int | None]]]:
    """For every leaf its per-layer names, each with the index into the stacked axis (None where it is not stacked):
    `stack/pattern_1/mlp/up/kernel` of two repeats becomes `stack/layer_1/...` and `stack/layer_3/...`."""
    found = {name: _BLOCK.fullmatch(name) for name in names}
    counts = {kind: len({m["number"] for m in found.values() if m and m["kind"] == kind})
              for kind in ("prefix", "pattern")}
    out = {}
    for name, match in found.items():
        if match is None:
            out[name] = [(name, None)]
        elif match["kind"] == "prefix":
            out[name] = [(f"{match['head']}layer_{match['number']}/{match['rest']}", None)]
        else:
            depths = [counts["prefix"] + r * counts["pattern"] + int(match["number"])
                      for r in range(names[name].shape[0])]
            out[name] = [(f"{match['head']}layer_{d}/{match['rest']}", r) for r, d in enumerate(depths)]
    return out
