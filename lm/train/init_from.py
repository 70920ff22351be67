"""Starting from another run's parameters, as far as they fit.

Layers are matched by their depth: a layer of a prefix fits one of a repeated pattern, and a deeper model takes the
layers that the other has.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm.core.depth import layer_names
from lm.core.tree import map_named, named_leaves


class Report(NamedTuple):
    """Names, one a layer: taken over, left fresh because the other run has none, left fresh because shapes differ, and
    those of the other run that found no place."""

    taken: list[str]
    missing: list[str]
    mismatched: list[str]
    unused: list[str]

    def __str__(self) -> str:
        lines = [f"{len(self.taken)} parameters taken over, {len(self.missing)} are new, {len(self.mismatched)} differ "
                 f"in shape and start fresh, {len(self.unused)} of the other run found no place"]
        for title, names in (("new", self.missing), ("differ in shape", self.mismatched), ("no place", self.unused)):
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            lines += [f"  {title}: {shown}"] if names else []
        return "\n".join(lines)


def on_host(leaf: jax.Array) -> np.ndarray:
    """A writable copy of the whole array, gathered from all processes where they share it."""
    if not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(jax.device_get(leaf))


def take_over(params: Any, other: Any) -> tuple[Any, Report]:
    """(params with the values of `other` wherever name and shape agree layer by layer, what happened).

    params: arrays on the devices; the result has their shardings and dtypes. other: arrays on the host.
    Raises ValueError where nothing agrees.
    """
    source = named_leaves(other)
    values = {layer: source[name] if index is None else source[name][index]
              for name, places in layer_names(source).items() for layer, index in places}
    report = Report([], [], [], sorted(set(values)))
    names = layer_names(named_leaves(params))

    def one(name, leaf):
        fresh = None
        for layer, index in names[name]:
            value = values.get(layer)
            shape = leaf.shape if index is None else leaf.shape[1:]
            if value is None:
                report.missing.append(layer)
            elif value.shape != shape:
                report.mismatched.append(f"{layer} {tuple(value.shape)} -> {tuple(shape)}")
            else:
                fresh = on_host(leaf) if fresh is None else fresh
                fresh[... if index is None else index] = value
                report.taken.append(layer)
        if fresh is None:
            return leaf
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda where: fresh[where])

    out = map_named(one, params)
    used = {entry.split(" ")[0] for entry in (*report.taken, *report.mismatched)}
    report = report._replace(unused=[name for name in report.unused if name not in used])
    if not report.taken:
        raise ValueError(f"no parameter of the other run fits this model; give a run of the same widths\n{report}")
    return out, report
