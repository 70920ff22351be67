"""Tensors of safetensors files, in the files' dtypes, and back (package `safetensors`)."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16),
          "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "U8": np.dtype("u1"), "BOOL": np.dtype("?")}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def package() -> Any:
    """The package; raises ValueError where it is not installed."""
    try:
        import safetensors
    except ImportError:
        raise ValueError("safetensors files need that package; pip install 'loomlm[convert]'") from None
    return safetensors


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """{name: array} of one file. Raises ValueError for a file that is damaged, cut or of another format."""
    library = package()
    try:
        found = library.deserialize(path.read_bytes())
    except library.SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}); fetch it again") from None
    tensors = {}
    for name, entry in found:
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is {entry['dtype']}; what can be read is {', '.join(DTYPES)}")
        tensors[name] = np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def read_folder(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of `model.safetensors`, or of the files that its index names."""
    if (folder / SINGLE).is_file():
        return read_safetensors(folder / SINGLE)
    try:
        places = json.loads((folder / INDEX).read_text())["weight_map"]
        names = sorted(set(places.values()))
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{folder / INDEX} has no 'weight_map' from tensors to files") from None
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(absent)}, which {INDEX} names")
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        tensors |= read_safetensors(folder / name)
    if lost := sorted(set(places) - set(tensors)):
        raise ValueError(f"{folder}: its files lack {', '.join(lost)}, which {INDEX} names")
    return tensors


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """One file of all tensors, in their dtypes."""
    package()
    from safetensors.numpy import save_file
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, {"format": "pt"})
