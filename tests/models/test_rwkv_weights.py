"""Real RWKV weights give the logits that the reference implementation gave for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.models.build import abstract_params, build_model, make_apply
from lm.models.convert.blinkdl import from_blinkdl, join_mixes, layout, model_config, version_of
from lm.models.convert.ggmf import NORM_EPS, read_ggmf
from lm.models.convert.names import to_names

PROMPT = b'"in'


def tensors_of(folder, version):
    (path,) = folder.glob(f"rwkv_tiny/tiny-rwkv-{version}-*.bin")
    return read_ggmf(path)


def config_of(tensors):
    made = model_config(tensors) | {"dtype": "float32"}
    if "rwkv5" in made:
        made["rwkv5"] |= {"norm_eps": NORM_EPS}
    return made


@pytest.mark.parametrize("version", ["4v0", "5v2", "7v0"])
@pytest.mark.parametrize("one_by_one", [False, True], ids=["parallel", "one_by_one"])
def test_logits_of_real_weights(shared_data, version, one_by_one):
    tensors = tensors_of(shared_data, version)
    want = np.frombuffer(next(shared_data.glob(f"rwkv_tiny/expected-logits-{version}-*.bin")).read_bytes(), "<f4")
    model = build_model(config_of(tensors), 256)
    params = jax.tree.map(jnp.asarray, from_blinkdl(tensors, model))
    expected = nn.meta.unbox(abstract_params(model))
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, expected)
    tokens, apply = jnp.asarray([list(PROMPT)]), jax.jit(make_apply(model))
    state = model.initial_state(1, capacity=8)
    for piece in (jnp.split(tokens, 3, axis=1) if one_by_one else [tokens]):
        out = apply(params, piece, state)
        state = out.state
    logits = out.hidden[0, -1] @ out.head.kernel.T
    np.testing.assert_allclose(logits, want, atol=1e-4)


@pytest.mark.parametrize("version", [*(pytest.param(n, marks=pytest.mark.slow) for n in (4, 5, 6)), 7])
def test_names_there_and_back(version):
    """Every parameter of a model has a name of BlinkDL's, and comes back bit by bit."""
    width, hidden = 16, dict(version=version, mlp_dim=32)
    fields = {4: {}, 5: dict(head_dim=8), 6: dict(head_dim=8, mix_rank=3, decay_rank=5),
              7: dict(head_dim=8, decay_rank=3, rate_rank=4, value_rank=5, gate_rank=6)}[version]
    config = dict(embed_dim=width, num_layers=3, vocab_size=20, tie_embeddings=False, norm="layer", embed_norm=True,
                  channel_mix=hidden, pattern=(f"rwkv{version}/channel_mix",)) | {f"rwkv{version}": fields}
    if version == 7:
        config |= dict(prefix=("rwkv7_first/channel_mix",),
                       rwkv7_first=dict(kind="rwkv7", value_residual=False, **fields))
    model, rng = build_model(config, 20), np.random.default_rng(0)
    shapes = nn.meta.unbox(abstract_params(model))
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)
    names = join_mixes(to_names(layout(version, 3, 8), params, model.vocab_size))
    assert version_of(names) == version
    again = build_model(model_config(names), 20)
    back = to_names(layout(version, 3, 8), from_blinkdl(names, again), 20)
    back = join_mixes(back)
    assert set(back) == set(names)
    for name in names:
        np.testing.assert_array_equal(back[name], names[name], err_msg=name)
    if version == 6:
        assert names["blocks.1.att.time_maa_w2"].shape == (5, 3, width)
        assert names["blocks.1.att.time_decay"].shape == (1, 1, width)
        assert names["blocks.1.att.time_faaaa"].shape == (2, 8)


def finch(p, tokens, K):
    """Logits after the last token, written from BlinkDL's code in his names: float64, one position at a time."""
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    flat = lambda name: p[name].reshape(-1)

    def norm(x, name, eps=1e-5, groups=1):
        y = x.reshape(groups, -1)
        y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + eps)
        return y.reshape(-1) * p[f"{name}.weight"] + p[f"{name}.bias"]

    C, L = p["emb.weight"].shape[1], 2
    H = C // K
    S, att, ffn = np.zeros((L, H, K, K)), np.zeros((L, C)), np.zeros((L, C))
    for token in tokens:
        x = norm(p["emb.weight"][token], "blocks.0.ln0")
        for n in range(L):
            b, a, f = f"blocks.{n}.", f"blocks.{n}.att.", f"blocks.{n}.ffn."
            z = norm(x, b + "ln1")
            xx, att[n] = att[n] - z, z
            low = np.tanh((z + xx * flat(a + "time_maa_x")) @ p[a + "time_maa_w1"]).reshape(5, -1)
            m = [low[i] @ p[a + "time_maa_w2"][i] for i in range(5)]
            xw, xk, xv, xr, xg = (z + xx * (flat(a + f"time_maa_{c}") + m[i]) for i, c in enumerate("wkvrg"))
            r, k, v = (p[a + f"{name}.weight"] @ y for name, y in (("receptance", xr), ("key", xk), ("value", xv)))
            g = p[a + "gate.weight"] @ xg
            w = flat(a + "time_decay") + np.tanh(xw @ p[a + "time_decay_w1"]) @ p[a + "time_decay_w2"]
            d, y = np.exp(-np.exp(w)).reshape(H, K), np.zeros((H, K))
            for h in range(H):
                now = np.outer(k.reshape(H, K)[h], v.reshape(H, K)[h])
                y[h] = r.reshape(H, K)[h] @ (S[n, h] + p[a + "time_faaaa"][h][:, None] * now)
                S[n, h] = d[h][:, None] * S[n, h] + now
            y = norm(y, a + "ln_x", 64e-5, H) * g * sigmoid(g)
            x = x + p[a + "output.weight"] @ y
            z = norm(x, b + "ln2")
            xx, ffn[n] = ffn[n] - z, z
            k = np.maximum(p[f + "key.weight"] @ (z + xx * flat(f + "time_maa_k")), 0) ** 2
            r = p[f + "receptance.weight"] @ (z + xx * flat(f + "time_maa_r"))
            x = x + sigmoid(r) * (p[f + "value.weight"] @ k)
    return p["head.weight"] @ norm(x, "ln_out")


def test_names_of_rwkv6_mean_what_they_mean_to_blinkdl():
    """No real weights of RWKV-6 are at hand: random ones, through a loop over his equations."""
    C, K, V, L, F, rng = 16, 8, 20, 2, 32, np.random.default_rng(0)
    norm = lambda name: {f"{name}.weight": (C,), f"{name}.bias": (C,)}
    shapes = {"emb.weight": (V, C), "head.weight": (V, C)} | norm("blocks.0.ln0") | norm("ln_out")
    for n in range(L):
        b = f"blocks.{n}."
        shapes |= norm(b + "ln1") | norm(b + "ln2") | norm(b + "att.ln_x")
        shapes |= {b + f"att.{m}.weight": (C, C) for m in ("receptance", "key", "value", "gate", "output")}
        shapes |= {b + f"att.time_maa_{c}": (1, 1, C) for c in "xwkvrg"}
        shapes |= {b + "att.time_maa_w1": (C, 15), b + "att.time_maa_w2": (5, 3, C), b + "att.time_decay": (1, 1, C),
                   b + "att.time_decay_w1": (C, 4), b + "att.time_decay_w2": (4, C), b + "att.time_faaaa": (C // K, K)}
        shapes |= {b + "ffn.time_maa_k": (1, 1, C), b + "ffn.time_maa_r": (1, 1, C), b + "ffn.key.weight": (F, C),
                   b + "ffn.receptance.weight": (C, C), b + "ffn.value.weight": (C, F)}
    tensors = {name: rng.normal(scale=0.5, size=shape).astype(np.float32) for name, shape in shapes.items()}
    model = build_model(model_config(tensors) | {"dtype": "float32"}, V)
    params = jax.tree.map(jnp.asarray, from_blinkdl(tensors, model))
    tokens = rng.integers(0, V, 9)
    out = jax.jit(make_apply(model))(params, jnp.asarray(tokens[None]))
    want = finch({name: value.astype(np.float64) for name, value in tensors.items()}, tokens, K)
    np.testing.assert_allclose((out.hidden[0, -1] @ out.head.kernel.T)[:V], want, rtol=1e-4, atol=1e-4)


def test_foreign_and_incomplete_weights_are_refused(shared_data):
    tensors = tensors_of(shared_data, "4v0")
    model = build_model(model_config(tensors), 256)
    less = {n: a for n, a in tensors.items() if n != "blocks.1.ffn.key.weight"}
    with pytest.raises(ValueError, match=r"missing blocks\.1\.ffn\.key\.weight; not understood nothing"):
        from_blinkdl(less, model)
    with pytest.raises(ValueError, match=r"missing nothing; not understood blocks\.0\.att\.gate;"):
        from_blinkdl(tensors | {"blocks.0.att.gate": np.zeros(3)}, model)
    with pytest.raises(ValueError, match=r"of another shape blocks\.2\.ffn\.value\.weight \[3, 5\]"):
        from_blinkdl(tensors | {"blocks.2.ffn.value.weight": np.zeros((3, 5))}, model)
    with pytest.raises(ValueError, match="no RWKV version known here"):
        from_blinkdl({"lm_head.weight": np.zeros((3, 3))}, model)
