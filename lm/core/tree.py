"""Names of leaves in a tree of parameters: `stack/pattern_0/attention/query/kernel`; adapters and
learned initial states under `lora/...` and `state/...`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax


def key_name(entry: Any) -> str:
    """One step of a tree path as plain text."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path joined with slashes; the collection name `params` in front is left out."""
    parts = [key_name(entry) for entry in path]
    return "/".join(parts[1:] if parts and parts[0] == "params" else parts)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Every leaf by its name, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """`fn(name, leaf, *leaves_of_rest)` over the tree."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(path_name(path), *leaves), tree, *rest,
                                            is_leaf=is_leaf)


def axes_of(boxed: Any) -> dict[str, tuple[str | None, ...]]:
    """The names of the axes of every leaf of a tree that flax boxed with them; none of one that it did not."""
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda leaf: hasattr(leaf, "names"))
    return {path_name(path): tuple(getattr(leaf, "names", ())) for path, leaf in leaves}


# The collection of a model's variables that holds running statistics: saved and used like parameters, not learned.
STATS = "stats"


def num_params(tree: Any) -> int:
    """Total number of elements, those of running statistics left out."""
    learned = {name: part for name, part in tree.items() if name != STATS} if isinstance(tree, Mapping) else tree
    return sum(leaf.size for leaf in jax.tree.leaves(learned))


# A leaf under one of these path parts holds one parameter of each repeated layer, stacked on its leading axis.
STACKED_PREFIX = "pattern_"


def is_stacked(name: str) -> bool:
    """Whether the leaf of this name carries a leading axis over repeated layers."""
    return any(part.startswith(STACKED_PREFIX) for part in name.split("/"))


def apart(state: Any) -> Any:
    """A decode state in the form that a loop over tokens changes in place, where it has one (a method `apart`)."""
    has = lambda node: hasattr(node, "apart")
    return jax.tree.map(lambda node: node.apart() if has(node) else node, state, is_leaf=has)
