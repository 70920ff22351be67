"""Tensors of a file that torch.save wrote, without torch and without running what the file says.

Such a file is a zip of a pickle and raw arrays. A pickle is a program: it calls what it names and sets attributes of
what came back. Here it may name a dozen things, all of which are ours, immutable, and build descriptions of tensors;
whatever else it asks for is refused. Arrays are made when it has ended.
"""

import math
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

STORAGES = {
    "DoubleStorage": np.dtype("<f8"), "FloatStorage": np.dtype("<f4"), "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16), "LongStorage": np.dtype("<i8"), "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"), "CharStorage": np.dtype("i1"), "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
LARGEST_PICKLE = 1 << 28  # bytes; a thousand times what a model of 40 blocks needs


class Kind(NamedTuple):
    """A class of storages."""

    name: str


class Storage(NamedTuple):
    """One array of the file, flat."""

    kind: str
    key: str
    count: int


class Tensor(NamedTuple):
    """A view of a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Names(dict):
    """A mapping that keeps no attributes: torch hangs metadata on its own, which nobody asks for here."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Nothing."""


class Call:
    """A function that a pickle may call and cannot change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise ValueError(f"it sets an attribute {name!r} of a function")


ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Call(Names),
    ("torch._utils", "_rebuild_tensor_v2"): Call(lambda storage, offset, size, stride, *_: Tensor(
        storage, offset, size, stride)),
    ("torch._utils", "_rebuild_parameter"): Call(lambda tensor, *_: tensor),
    **{("torch", name): Kind(name) for name in STORAGES},
}


class Unpickler(pickle.Unpickler):
    """Knows the names of ALLOWED alone."""

    def find_class(self, module: str, name: str) -> Any:
        """The allowed thing of this name; raises ValueError for every other."""
        if (module, name) not in ALLOWED:
            raise ValueError(f"it asks for {module}.{name}, which is no part of a tensor; nothing of it was run")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        """The storage that ("storage", kind, key, place, count) names."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], Kind)
                and isinstance(pid[2], str) and isinstance(pid[4], int)):
            raise ValueError(f"it refers to {str(pid)[:80]!r}, which is no array")
        return Storage(pid[1].name, pid[2], pid[4])


def read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    """{name: array} of a state_dict that torch.save wrote, in the file's dtypes.

    Raises ValueError for a file that is cut or of another format, for one that holds anything but named tensors, and
    for one whose pickle asks for something that builds no tensor; nothing that it names is ever run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _tensors(archive)
    except Exception as error:  # a pickle that is no pickle fails in any way it likes
        raise ValueError(f"{path} cannot be read as a file of torch.save: {error or type(error).__name__}") from None


def _tensors(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    files = {info.filename: info for info in archive.infolist()}
    pickled = [name for name in files if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickled) != 1:
        raise ValueError("it has no data.pkl")
    folder = pickled[0].partition("/")[0]
    if any(info.compress_type != zipfile.ZIP_STORED for info in files.values()):
        raise ValueError("it is compressed, as torch.save never does")
    if f"{folder}/byteorder" in files and archive.read(f"{folder}/byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    if files[pickled[0]].file_size > LARGEST_PICKLE:
        raise ValueError(f"its pickle is larger than {LARGEST_PICKLE:,} bytes")
    with archive.open(pickled[0]) as file:
        made = Unpickler(file).load()
    if not isinstance(made, dict):
        raise ValueError(f"it holds no mapping from names to tensors, but a {type(made).__name__}")
    if other := [f"{k!r} ({type(v).__name__})" for k, v in made.items()
                 if not (isinstance(k, str) and isinstance(v, Tensor))]:
        raise ValueError(f"it holds more than named tensors: {', '.join(other[:4])}")
    storages: dict[Storage, np.ndarray] = {}
    for name, tensor in made.items():
        storage = tensor.storage
        if not isinstance(storage, Storage) or f"{folder}/data/{storage.key}" not in files:
            raise ValueError(f"the data of {name} are not in it")
        if storage not in storages:
            storages[storage] = _flat(archive.read(f"{folder}/data/{storage.key}"), storage)
        made[name] = _view(storages[storage], tensor, name)
    return dict(made)


def _flat(data: bytes, storage: Storage) -> np.ndarray:
    dtype = STORAGES[storage.kind]
    if len(data) != storage.count * dtype.itemsize:
        raise ValueError(f"array {storage.key} has {len(data):,} bytes where {storage.count:,} values of {dtype} are "
                         f"{storage.count * dtype.itemsize:,}")
    return np.frombuffer(data, dtype)


def _view(flat: np.ndarray, tensor: Tensor, name: str) -> np.ndarray:
    """The tensor as a view of its storage, if it lies inside."""
    offset, size, stride = tensor.offset, tensor.size, tensor.stride
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
            and all(isinstance(n, int) and n >= 0 for n in (offset, *size, *stride))):
        raise ValueError(f"{name} has size {size!r} and stride {stride!r}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) == 0 or math.prod(size) > len(flat) or last >= len(flat):
        raise ValueError(f"{name} has size {size} and stride {stride} in an array of {len(flat):,} values")
    return np.lib.stride_tricks.as_strided(flat[offset:], size, [s * flat.itemsize for s in stride], writeable=False)
