"""rwkv.cpp's files, magic `ggmf`: RWKV weights in float32 or float16, one tensor after another.

Header: int32 magic, version, vocabulary, width, blocks, dtype. A tensor: int32 dimensions, length of the name, dtype;
the shape, reversed; the name; the data. What the format transforms is turned back to BlinkDL's names and values.
"""

import math
import pathlib
import struct

import numpy as np

MAGIC = b"fmgg"  # little-endian 'ggmf'
DTYPES = {0: np.dtype("<f4"), 1: np.dtype("<f2")}
NORM_EPS = 1e-5  # of the heads in RWKV-5, which rwkv.cpp takes without dividing by 8


def read_ggmf(path: pathlib.Path) -> dict[str, np.ndarray]:
    """{BlinkDL's name: array}. Raises ValueError for another format, a quantised tensor, and a file that is cut."""
    data = path.read_bytes()
    if data[:4] != MAGIC or len(data) < 24:
        raise ValueError(f"{path} is no rwkv.cpp file: it does not begin with {MAGIC!r}")
    at, tensors = 24, {}
    try:
        while at < len(data):
            name, value, at = _tensor(data, at, path)
            tensors[name] = value
    except (struct.error, UnicodeDecodeError):
        raise ValueError(f"{path} is damaged or cut short at byte {at:,} of {len(data):,}; fetch it again") from None
    return restored(tensors)


def _tensor(data: bytes, at: int, path: pathlib.Path) -> tuple[str, np.ndarray, int]:
    dims, length, dtype = struct.unpack_from("<3i", data, at)
    if not (1 <= dims <= 4 and 0 < length < 256):
        raise struct.error
    shape = struct.unpack_from(f"<{dims}i", data, at + 12)[::-1]
    at += 12 + 4 * dims
    name = data[at:at + length].decode()
    at += length
    if dtype not in DTYPES:
        raise ValueError(f"{path} is quantised: {name} has the format's type {dtype}; convert from the float32 or "
                         f"float16 file")
    count = math.prod(shape)
    size = count * DTYPES[dtype].itemsize
    if min(shape) < 1 or at + size > len(data):
        raise struct.error
    return name, np.frombuffer(data, DTYPES[dtype], count, at).reshape(shape), at + size


def restored(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """BlinkDL's names and values. The format keeps RWKV-4's decay as -exp(time_decay), that of RWKV-5 as
    exp(-exp(time_decay)), joins RWKV-7's mixtures and transposes its low-rank maps."""
    if any(name.endswith("time_maa_w1") for name in tensors):
        raise ValueError("RWKV-6 in rwkv.cpp's format is not known here; convert from BlinkDL's .pth")
    out = {}
    seven = any(name.endswith("x_rwkvag") for name in tensors)
    for name, value in tensors.items():
        if name.endswith("x_rwkvag"):
            for letter, row in zip("rwkvag", value, strict=True):
                out[name.replace("x_rwkvag", f"x_{letter}")] = row
            continue
        if seven and name[-2:] in {f"{x}{n}" for x in "wavg" for n in (1, 2)}:
            value = value.T
        elif name.endswith("att.time_decay") and value.ndim == 3:
            decay = np.clip(value.reshape(value.shape[:2]).astype(np.float64), 1e-38, 1 - 2.0**-26)
            value = np.log(-np.log(decay)).astype(np.float32)
        elif name.endswith("att.time_decay"):
            value = np.log(-value)
        elif name.endswith("att.time_faaaa"):
            value = value.reshape(value.shape[:2])
        out[name] = value
    return out
