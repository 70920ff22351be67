"""Which parameter an array of the optimizer's state belongs to, and so how it is split over the mesh."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.core.tree import key_name, path_name


def map_owned(fn: Callable[..., Any], state: Any, *params: Any) -> Any:
    """`fn(name, leaf, *owner)` over a state. `owner` is the leaf of each tree of `params` that the array belongs to,
    and is left out where it belongs to none.

    optax keeps moments in trees like the parameters, so the path of a moment ends with the path of its parameter.
    """
    flat = [jax.tree_util.tree_leaves_with_path(tree) for tree in params]
    owners = {tuple(map(key_name, leaves[0][0])): tuple(leaf for _, leaf in leaves)
              for leaves in zip(*flat, strict=True)}

    def one(path, leaf):
        names = tuple(map(key_name, path))
        owner = next((owners[names[i:]] for i in range(len(names)) if names[i:] in owners), ())
        return fn(path_name(path), leaf, *owner)

    return jax.tree_util.tree_map_with_path(one, state)


def opt_state_shardings(tx: optax.GradientTransformation, params_shapes: Any, param_shardings: Any, mesh: Mesh) -> Any:
    """Sharding of every array of `tx.init(params)`: that of its parameter where the shapes agree; for factored moments
    that of the parameter without the averaged dimension; for numbers of whole rows that of the parameter's first
    dimensions; replicated for everything else (step counts).

    Args:
      params_shapes: tree of arrays or shapes. param_shardings: tree of `NamedSharding` of the same structure.
    """
    state = jax.eval_shape(tx.init, params_shapes)

    def one(name, leaf, param=None, sharding=None):
        if param is None:
            return NamedSharding(mesh, PartitionSpec())
        parts = (*sharding.spec, *[None] * (len(param.shape) - len(sharding.spec)))
        if leaf.shape == param.shape:
            return NamedSharding(mesh, PartitionSpec(*parts))
        gone = _averaged_dimension(name, leaf.shape, param.shape)
        if gone is None and leaf.shape == param.shape[:len(leaf.shape)]:  # one number a row of a table
            return NamedSharding(mesh, PartitionSpec(*parts[:len(leaf.shape)]))
        return NamedSharding(mesh, PartitionSpec(*(parts[:gone] + parts[gone + 1:] if gone is not None else ())))

    return map_owned(one, state, params_shapes, param_shardings)


def _averaged_dimension(name: str, shape: tuple[int, ...], param: tuple[int, ...]) -> int | None:
    """The dimension of `param` that is missing in `shape`; None where it is not `param` without one dimension."""
    missing = [i for i in range(len(param)) if param[:i] + param[i + 1:] == shape]
    if not missing:
        return None
    # Equal sizes leave a choice: optax averages rows over the last of them and columns over the one before.
    return missing[-1] if "v_row" in name.split("/") else missing[-2:][0]


def bytes_per_device(tree: Any) -> int:
    """Largest number of bytes that one device holds of a tree of committed arrays."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0)
