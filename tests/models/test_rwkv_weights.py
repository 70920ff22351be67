"""Real RWKV weights give the logits that the reference implementation gave for them."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.models.build import abstract_params, build_model, make_apply
from lm.models.convert.blinkdl import from_blinkdl, model_config

PROMPT = b'"in'


def read_ggmf(path):
    """{name: array} of an rwkv.cpp file in float32: a header of six int32, then tensors with reversed shapes."""
    data = path.read_bytes()
    assert data[:4] == b"fmgg"
    at, tensors = 24, {}
    while at < len(data):
        dims, length, dtype = struct.unpack_from("<3i", data, at)
        assert dtype == 0
        shape = struct.unpack_from(f"<{dims}i", data, at + 12)[::-1]
        at += 12 + 4 * dims
        name = data[at:at + length].decode()
        at += length
        count = int(np.prod(shape))
        tensors[name] = np.frombuffer(data, "<f4", count, at).reshape(shape)
        at += 4 * count
    return tensors


def tensors_of(folder, version):
    (path,) = folder.glob(f"rwkv_tiny/tiny-rwkv-{version}-*.bin")
    tensors = read_ggmf(path)
    for name in [n for n in tensors if n.endswith("x_rwkvag")]:  # the format joins these, and transposes the low ranks
        for letter, row in zip("rwkvag", tensors.pop(name), strict=True):
            tensors[name.replace("x_rwkvag", f"x_{letter}")] = row
    tensors = {n: a.T if n[-2:] in {f"{x}{i}" for x in "wavg" for i in (1, 2)} else a for n, a in tensors.items()}
    if version == "4v0":  # this format keeps the decay as -exp(time_decay)
        tensors = {n: np.log(-a) if n.endswith("time_decay") else a for n, a in tensors.items()}
    return tensors


@pytest.mark.parametrize("version", ["4v0", "7v0"])
@pytest.mark.parametrize("one_by_one", [False, True], ids=["parallel", "one_by_one"])
def test_logits_of_real_weights(shared_data, version, one_by_one):
    tensors = tensors_of(shared_data, version)
    want = np.frombuffer(next(shared_data.glob(f"rwkv_tiny/expected-logits-{version}-*.bin")).read_bytes(), "<f4")
    model = build_model(model_config(tensors) | {"dtype": "float32"}, 256)
    params = jax.tree.map(jnp.asarray, from_blinkdl(tensors, model.padded_vocab))
    expected = nn.meta.unbox(abstract_params(model))
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, expected)
    tokens, apply = jnp.asarray([list(PROMPT)]), make_apply(model)
    state = model.initial_state(1, capacity=8)
    for piece in (jnp.split(tokens, 3, axis=1) if one_by_one else [tokens]):
        out = apply(params, piece, state)
        state = out.state
    logits = out.hidden[0, -1] @ out.head.kernel.T
    np.testing.assert_allclose(logits, want, atol=1e-4)


def test_foreign_and_incomplete_weights_are_refused(shared_data):
    tensors = tensors_of(shared_data, "4v0")
    model = build_model(model_config(tensors), 256)
    less = {n: a for n, a in tensors.items() if n != "blocks.1.ffn.key.weight"}
    with pytest.raises(ValueError, match=r"missing \['blocks\.1\.ffn\.key\.weight'\]"):
        from_blinkdl(less, model.padded_vocab)
    with pytest.raises(ValueError, match=r"not understood \['blocks\.0\.att\.gate'\]"):
        from_blinkdl(tensors | {"blocks.0.att.gate": np.zeros(3)}, model.padded_vocab)
    with pytest.raises(ValueError, match="no RWKV version known here"):
        from_blinkdl({"lm_head.weight": np.zeros((3, 3))}, 128)
