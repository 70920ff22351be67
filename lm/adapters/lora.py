"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): a pair (a, b) beside a kernel, W x becomes (W + a b) x.

Adapters are a tree of their own, `variables["lora"]`, with the names of the parameters: beside
`stack/pattern_0/attention/query/kernel` [R, in, out] stand `.../query/a` [R, in, r] and `.../query/b` [R, r, out].
The output head stores its kernel as [V, D]; its adapter is a [D, r], b [r, V] all the same. With a magnitude (DoRA, Liu
et al. 2024, arXiv:2402.09353) `.../query/magnitude` [R, out] stands there too: the length of each output's column.
"""

import difflib
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.low_rank import column_norm, column_scale
from lm.core.tree import is_stacked, named_leaves

HEAD = "head/kernel"  # the one kernel that is stored as [out, in]


def init_lora(key: jax.Array, params: Any, rank: int, match: str, alpha: float | None = None,
              magnitude: bool = False) -> dict[str, Any]:
    """Adapters for every kernel whose name the regular expression `match` finds.

    a is normal with standard deviation alpha / (rank sqrt(in)) and b is zero, so the model computes what it did before.
    The usual factor alpha / rank is thus part of a (alpha None: 1); nothing has to be remembered to merge. (It learns
    as with the factor outside where a's learning rate is multiplied by it, under optimizers that do not see the scale
    of gradients; `lm train` does so.)

    Args:
      key: each kernel folds its name in, and each stacked layer its index, so that an adapter does not depend on which
        others are made.
      params: arrays or shapes, `variables["params"]`; only kernels, [in, out] or stacked [R, in, out], are matched.
        Embedding tables, also where the head is tied to them, have no adapter.
      magnitude: add the lengths of the kernels' columns, which then learn apart from their directions (zeros where
        `params` are shapes).

    Raises ValueError for a rank below 1, and where no kernel is matched (naming the nearest).
    """
    if rank < 1:
        raise ValueError(f"the rank of an adapter must be at least 1; got {rank}")
    kernels = {name: leaf for name, leaf in named_leaves(params).items() if name.split("/")[-1] == "kernel"}
    matched = [name for name in kernels if re.search(match, name)]
    if not matched:
        near = difflib.get_close_matches(re.sub(r"[^\w/]", "", match), kernels, n=3, cutoff=0.0)
        raise ValueError(f"no kernel is matched by {match!r}; the nearest are {', '.join(near) or 'none'} (embedding "
                         "tables and vectors have no adapter)")
    scale = 1.0 if alpha is None else alpha / rank
    tree: dict[str, Any] = {}
    for name in matched:
        fan_in, fan_out, layers = _dimensions(name, kernels[name].shape)
        folded = jax.random.fold_in(key, zlib.crc32(name.encode()))
        draw = lambda k, fan_in=fan_in, dtype=kernels[name].dtype: (
            scale * fan_in**-0.5 * jax.random.normal(k, (fan_in, rank), dtype))
        keys = jax.vmap(lambda i, folded=folded: jax.random.fold_in(folded, i))(jnp.arange(layers or 1))
        a = jax.vmap(draw)(keys) if layers else draw(keys[0])
        node = tree
        for part in name.split("/")[:-1]:
            node = node.setdefault(part, {})
        node["a"] = a
        node["b"] = jnp.zeros((*a.shape[:-2], rank, fan_out), a.dtype)
        if magnitude:
            node["magnitude"] = jnp.zeros((*a.shape[:-2], fan_out), jnp.float32)
    shapes = any(isinstance(kernel, jax.ShapeDtypeStruct) for kernel in kernels.values())
    return measured(params, tree) if magnitude and not shapes else tree


def measured(params: Any, lora: Any, path: tuple[str, ...] = ()) -> Any:
    """`lora` with every magnitude set to what the kernel and its adapter have now: the same function as without.

    For magnitudes of other parameters than those that they were made from.
    """
    if "a" in lora and "b" in lora:
        kernel = params["kernel"].mT if "/".join((*path, "kernel")) == HEAD else params["kernel"]
        return {**lora, "magnitude": column_norm(kernel, lora["a"], lora["b"])} if "magnitude" in lora else lora
    return {part: measured(params[part], below, (*path, part)) for part, below in lora.items()}


def _dimensions(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(in, out, stacked layers or 0) of a kernel."""
    layers, matrix = (shape[0], shape[1:]) if is_stacked(name) else (0, shape)
    if len(matrix) != 2:
        raise ValueError(f"an adapter needs a kernel of two dimensions a layer; {name} has shape {tuple(shape)}")
    return (*(matrix[::-1] if name == HEAD else matrix), layers)


def merge(params: Any, lora: Any) -> Any:
    """`params` with every adapter added to its kernel: the same function without the `lora` collection.

    Raises ValueError for an adapter without a kernel, or one of the wrong shape.
    """
    return _add(params, lora, 1)


def unmerge(params: Any, lora: Any) -> Any:
    """The inverse of `merge` with the same adapters, up to rounding.

    Raises ValueError for adapters with a magnitude: merging forgets the lengths that the columns had.
    """
    if any(name.split("/")[-1] == "magnitude" for name in named_leaves(lora)):
        raise ValueError("adapters with a magnitude (DoRA) cannot be taken out again: merging forgets the lengths that "
                         "the columns had; keep the parameters from before")
    return _add(params, lora, -1)


def _add(params: Mapping[str, Any], lora: Mapping[str, Any], sign: int, path: tuple[str, ...] = ()) -> dict[str, Any]:
    params = dict(params)
    if "a" in lora and "b" in lora:
        name = "/".join((*path, "kernel"))
        if "kernel" not in params:
            raise ValueError(f"the adapter {'/'.join(path)} has no kernel beside it; there are: {', '.join(params)}")
        delta = jnp.matmul(lora["a"], lora["b"], precision="highest")
        delta = delta.mT if name == HEAD else delta
        if delta.shape != params["kernel"].shape:
            raise ValueError(f"the adapter of {name} makes {delta.shape}, the kernel is {params['kernel'].shape}")
        kernel = params["kernel"] + sign * delta
        if "magnitude" in lora:
            before = params["kernel"].mT if name == HEAD else params["kernel"]
            scale = column_scale(before, lora["a"], lora["b"], lora["magnitude"])
            kernel = kernel * (scale[..., :, None] if name == HEAD else scale[..., None, :])
        params["kernel"] = kernel.astype(params["kernel"].dtype)
        return params
    for part, below in lora.items():
        if part not in params:
            near = difflib.get_close_matches(part, params, n=1, cutoff=0.0)
            raise ValueError(f"adapters name {'/'.join((*path, part))}, which the parameters do not have; nearest: "
                             f"{', '.join(near) or 'none'}")
        params[part] = _add(params[part], below, sign, (*path, part))
    return params


def split(variables: Mapping[str, Any]) -> tuple[Any, Any]:
    """(params, lora) of a model's variables; lora is {} where there are no adapters."""
    return variables["params"], variables.get("lora", {})


def join(params: Any, lora: Any) -> dict[str, Any]:
    """The variables of a model: {"params": ...}, with {"lora": ...} where there are adapters."""
    return {"params": params, "lora": lora} if lora else {"params": params}
