"""Files of weights: read exactly, refused where they are cut, foreign, or ask for more than tensors."""

import collections
import io
import os
import pickle
import struct
import sys
import types
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from lm.models.convert.ggmf import read_ggmf
from lm.models.convert.safetensors_file import read_folder, read_safetensors, write_safetensors
from lm.models.convert.source import read_weights
from lm.models.convert.torch_file import read_torch

BF16 = np.dtype(jnp.bfloat16)


class Stored:
    """What persistent_id writes for an array."""

    def __init__(self, kind, key, count):
        self.pid = ("storage", kind, key, "cpu", count)


class Rebuilt:
    """A tensor as torch pickles it."""

    def __init__(self, function, storage, offset, size, stride):
        self.made = function, (storage, offset, size, stride, False, collections.OrderedDict())

    def __reduce__(self):
        return self.made


@pytest.fixture
def torch_names(monkeypatch):
    """Things that pickle under torch's names, whether or not it is installed."""
    def add(module, name, thing):
        thing.__module__, thing.__name__, thing.__qualname__ = module, name, name
        setattr(modules[module], name, thing)
        return thing

    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    kinds = {n: add("torch", n, type(n, (), {})) for n in ("FloatStorage", "HalfStorage", "BFloat16Storage")}
    return types.SimpleNamespace(rebuild=add("torch._utils", "_rebuild_tensor_v2", lambda *args: None),
                                 parameter=add("torch._utils", "_rebuild_parameter", lambda *args: None), **kinds)


def save(path, made, arrays, compression=zipfile.ZIP_STORED, folder="archive"):
    """A file as torch.save lays it out, of a pickled object and {key: bytes}."""
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return value.pid if isinstance(value, Stored) else None

    text = io.BytesIO()
    Pickler(text, protocol=2).dump(made)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{folder}/data.pkl", text.getvalue())
        archive.writestr(f"{folder}/byteorder", "little")
        for key, data in arrays.items():
            archive.writestr(f"{folder}/data/{key}", data)
        archive.writestr(f"{folder}/version", "3\n")
    return path


def test_tensors_of_torch_save(torch_names, tmp_path):
    """Dtypes, transposed and shared storage, an offset, a scalar, a Parameter, and metadata on the mapping."""
    t = torch_names
    wide, half = np.arange(12, dtype="<f4"), np.arange(6).astype(BF16)
    storage = Stored(t.FloatStorage, "0", 12)

    class Parameter:
        def __reduce__(self):
            return t.parameter, (Rebuilt(t.rebuild, storage, 0, (12,), (1,)), True, collections.OrderedDict())

    names = collections.OrderedDict(
        plain=Rebuilt(t.rebuild, storage, 0, (3, 4), (4, 1)), turned=Rebuilt(t.rebuild, storage, 4, (4, 2), (1, 4)),
        half=Rebuilt(t.rebuild, Stored(t.BFloat16Storage, "1", 6), 0, (2, 3), (3, 1)),
        scalar=Rebuilt(t.rebuild, storage, 7, (), ()), parameter=Parameter())
    names._metadata = {"": {"version": 1}}
    read = read_torch(save(tmp_path / "a.pth", names, {"0": wide.tobytes(), "1": half.tobytes()}))
    assert list(read) == list(names)
    np.testing.assert_array_equal(read["plain"], wide.reshape(3, 4))
    np.testing.assert_array_equal(read["turned"], wide[4:].reshape(2, 4).T)
    np.testing.assert_array_equal(read["half"], half.reshape(2, 3))
    assert read["half"].dtype == BF16 and read["scalar"] == 7.0
    np.testing.assert_array_equal(read["parameter"], wide)


class Evil:
    def __init__(self, function, *args):
        self.made = function, args

    def __reduce__(self):
        return self.made


def test_nothing_that_a_pickle_names_is_run(tmp_path, torch_names):
    mark = tmp_path / "mark"
    for made, asked in ((Evil(os.system, f"touch {mark}"), r"\w+\.system"), (Evil(eval, "1"), "__builtin__.eval"),
                        (Evil(open, str(mark), "w"), r"\w+\.open"), (Evil(getattr, 1, "real"), r"\w+\.getattr"),
                        (Evil(torch_names.rebuild, Evil(os.mkdir, str(mark))), r"\w+\.mkdir")):
        path = save(tmp_path / "evil.pth", {"a": made}, {})
        with pytest.raises(ValueError, match=f"evil.pth cannot be read.*it asks for {asked}, .*nothing of it was run"):
            read_torch(path)
        with pytest.raises(ValueError, match="nothing of it was run"):
            read_weights(path)
    assert not mark.exists()


def test_a_pickle_cannot_change_what_it_may_call(tmp_path):
    """BUILD sets attributes: here of the function that rebuilds tensors."""
    text = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0b\x00\x00\x00__globals__N\x73\x86b."
    with zipfile.ZipFile(tmp_path / "evil.pth", "w") as archive:
        archive.writestr("archive/data.pkl", text)
    with pytest.raises(ValueError, match="sets an attribute '__globals__' of a function"):
        read_torch(tmp_path / "evil.pth")


@pytest.mark.parametrize("offset, size, stride", [(0, (4, 4), (4, 1)), (5, (8,), (1,)), (0, (2,), (12,)),
                                                  (-1, (2,), (1,)), (0, (1000, 1000), (0, 0)), (0, (2, 2), (1,)),
                                                  (0, ("2",), (1,))])
def test_views_outside_of_their_array_are_refused(torch_names, tmp_path, offset, size, stride):
    tensor = Rebuilt(torch_names.rebuild, Stored(torch_names.FloatStorage, "0", 12), offset, size, stride)
    with pytest.raises(ValueError, match=r"a\.pth cannot be read .*the_name has size"):
        read_torch(save(tmp_path / "a.pth", {"the_name": tensor}, {"0": bytes(48)}))


def test_other_things_than_tensors_are_refused(torch_names, tmp_path):
    tensor = Rebuilt(torch_names.rebuild, Stored(torch_names.FloatStorage, "0", 3), 0, (3,), (1,))
    path = tmp_path / "a.pth"
    for made, arrays, message in (({"a": tensor, "epoch": 3}, {"0": bytes(12)}, r"more than named tensors: 'epoch'"),
                                  ([tensor], {"0": bytes(12)}, "no mapping from names to tensors, but a list"),
                                  ({"a": tensor}, {"0": bytes(11)}, "array 0 has 11 bytes where 3 values"),
                                  ({"a": tensor}, {}, "the data of a are not in it")):
        with pytest.raises(ValueError, match=message):
            read_torch(save(path, made, arrays))
    with pytest.raises(ValueError, match="compressed"):
        read_torch(save(path, {"a": tensor}, {"0": bytes(12)}, zipfile.ZIP_DEFLATED))
    whole = save(path, {"a": tensor}, {"0": bytes(12)}).read_bytes()
    for cut in (len(whole) - 30, len(whole) // 2, 40):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"a\.pth cannot be read as a file of torch\.save"):
            read_torch(path)


def ggmf(tensors):
    """Bytes of an rwkv.cpp file."""
    out = struct.pack("<6i", 0x67676D66, 101, 5, 4, 1, 0)
    for name, value in tensors.items():
        out += struct.pack("<3i", value.ndim, len(name), 0) + struct.pack(f"<{value.ndim}i", *value.shape[::-1])
        out += name.encode() + value.astype("<f4").tobytes()
    return out


def test_rwkv_cpp_files(tmp_path):
    path, rng = tmp_path / "a.bin", np.random.default_rng(0)
    decay = rng.normal(size=(2, 3)).astype("<f4")
    stored = {"emb.weight": rng.normal(size=(5, 4)), "blocks.0.att.time_decay": np.exp(-np.exp(decay))[..., None]}
    path.write_bytes(ggmf(stored))
    read = read_ggmf(path)
    np.testing.assert_array_equal(read["emb.weight"], stored["emb.weight"].astype("<f4"))
    np.testing.assert_allclose(read["blocks.0.att.time_decay"], decay, rtol=1e-5, atol=1e-5)
    whole = path.read_bytes()
    for cut in (len(whole) - 1, 60, 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="damaged or cut short at byte"):
            read_ggmf(path)
    path.write_bytes(whole.replace(struct.pack("<3i", 2, 10, 0), struct.pack("<3i", 2, 10, 7)))
    with pytest.raises(ValueError, match=r"quantised: emb\.weight has the format's type 7"):
        read_ggmf(path)


def test_safetensors_there_and_back(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "model.safetensors"
    given = {"a": rng.normal(size=(3, 4)).astype("<f4"), "b": rng.normal(size=5).astype(BF16),
             "c": rng.normal(size=(2, 1, 2)).astype("<f2"), "turned": rng.normal(size=(2, 3)).astype("<f4").T}
    write_safetensors(path, given)
    read = read_folder(tmp_path)
    assert {n: (a.dtype, a.shape) for n, a in read.items()} == {n: (a.dtype, a.shape) for n, a in given.items()}
    assert all(read[n].tobytes() == np.ascontiguousarray(a).tobytes() for n, a in given.items())
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:20], b"\xff" * 8 + whole[8:], whole + b"x"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="is no whole safetensors file"):
            read_safetensors(path)
    path.unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "z": "two.safetensors"}}')
    write_safetensors(tmp_path / "one.safetensors", {"a": given["a"]})
    with pytest.raises(ValueError, match=r"lacks two\.safetensors, which model"):
        read_folder(tmp_path)
    write_safetensors(tmp_path / "two.safetensors", {"b": given["b"]})
    with pytest.raises(ValueError, match="its files lack z, which model"):
        read_folder(tmp_path)


def test_unknown_files_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")  # torch.save before 1.6
    with pytest.raises(ValueError, match=r"begins with .*no file of torch\.save \(since torch 1\.6\)"):
        read_weights(path)
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*did you mean 'model\.pth'"):
        read_weights(tmp_path / "modle.pth")
    with pytest.raises(ValueError, match=r"has no config\.json: give the folder of a Hugging Face model"):
        read_weights(tmp_path)
    config = tmp_path / "config.json"
    for text, message in (("[]", "is no JSON object"), ('{"model_type": "bert"}', "has no model.safetensors")):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_weights(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {"a": np.zeros(3, "<f4")})
    with pytest.raises(ValueError, match="model_type='bert' is not known here; known: llama, rwkv"):
        read_weights(tmp_path)
    with pytest.raises(ValueError, match=r"has tensors a, \.\.\. and no config\.json: not an RWKV file"):
        read_weights(tmp_path / "model.safetensors")
