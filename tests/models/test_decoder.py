"""The decoder model: prefill and decoding, scan and unrolled, padding of the vocabulary, adapters of the head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.adapters.lora import init_lora, merge
from lm.core.head import logits_of
from lm.core.tree import named_leaves
from lm.models.build import build_model, init_params, make_apply, resolve_model
from lm.models.decoder import positions_after

BASE = dict(embed_dim=32, num_layers=4, attention=dict(num_heads=4, num_kv_heads=2), mlp=dict(activation="swiglu"),
            dtype="float32", vocab_multiple=8)
TOKENS = jax.random.randint(jax.random.key(1), (3, 16), 0, 50)


def model_and_params(**changes):
    model = build_model({**BASE, **changes}, 50)
    return model, init_params(model, jax.random.key(0))


def logits(model, params, tokens=TOKENS, **kwargs):
    out = make_apply(model)(params, tokens, **kwargs)
    return logits_of(out.hidden, out.head)


@pytest.mark.parametrize("changes", [
    dict(scan=False), dict(remat="full"), dict(remat="dots", scan=False), dict(remat="minimal")], ids=str)
def test_execution_forms_agree_in_values_and_gradients(changes):
    model, params = model_and_params()
    other, same = model_and_params(**changes)
    assert all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True))

    def loss(model):
        return lambda p: jnp.mean(jnp.square(make_apply(model)(p, TOKENS).hidden))
    (a, ga), (b, gb) = (jax.jit(jax.value_and_grad(loss(m)))(params) for m in (model, other))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    for x, y in zip(jax.tree.leaves(ga), jax.tree.leaves(gb), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_initial_values_do_not_depend_on_prefix_or_pattern():
    """Layer 2 of 4 starts the same whether it stands in a prefix, a pattern of one block or a pattern of two."""
    _, whole = model_and_params()
    _, headed = model_and_params(prefix=("attention/mlp", "attention/mlp"))
    _, paired = model_and_params(pattern=("attention/mlp", "attention/mlp"))
    whole, headed, paired = (p["params"]["stack"] for p in (whole, headed, paired))
    for a, b, c, d in zip(jax.tree.leaves(whole["pattern_0"]), jax.tree.leaves(headed["prefix_1"]),
                          jax.tree.leaves(headed["pattern_0"]), jax.tree.leaves(paired["pattern_0"]), strict=True):
        np.testing.assert_array_equal(a[1], b)
        np.testing.assert_array_equal(a[2], c[0])
        np.testing.assert_array_equal(a[2], d[1])


def test_decoding_equals_the_whole_pass():
    model, params = model_and_params()
    whole = logits(model, params)
    apply = jax.jit(make_apply(model))
    state, outs = model.initial_state(3, capacity=16), []
    for t in (slice(0, 7), *(slice(t, t + 1) for t in range(7, 16))):
        out = apply(params, TOKENS[:, t], state)
        state = out.state
        outs.append(logits_of(out.hidden, out.head))
    np.testing.assert_allclose(jnp.concatenate(outs, 1)[..., :50], whole[..., :50], atol=1e-5)
    np.testing.assert_array_equal(state.positions, 16)


def test_window_ring_equals_the_whole_pass_long_after_it_wrapped():
    model, params = model_and_params(attention=dict(num_heads=4, window=3))
    whole, apply = logits(model, params), jax.jit(make_apply(model))
    state, outs = model.initial_state(3, capacity=16), []
    assert state.stack.pattern[0][0].keys.shape[2] == 3
    for t in (slice(0, 5), slice(5, 6), slice(6, 11), *(slice(t, t + 1) for t in range(11, 16))):
        out = apply(params, TOKENS[:, t], state)
        state = out.state
        outs.append(logits_of(out.hidden, out.head))
    np.testing.assert_allclose(jnp.concatenate(outs, 1)[..., :50], whole[..., :50], atol=1e-5)


def test_learned_positions_go_on_from_the_state():
    model, params = model_and_params(max_positions=16, attention=dict(num_heads=4, rope_theta=None))
    whole = logits(model, params)
    first = make_apply(model)(params, TOKENS[:, :6], model.initial_state(3, capacity=16))
    out = make_apply(model)(params, TOKENS[:, 6:], first.state)
    np.testing.assert_allclose(logits_of(out.hidden, out.head)[..., :50], whole[:, 6:, :50], atol=1e-5)


def test_more_tokens_than_learned_positions_are_refused():
    model, _ = model_and_params(max_positions=16, attention=dict(num_heads=4, rope_theta=None))
    with pytest.raises(ValueError, match="17 tokens do not fit the 16 learned positions"):
        model.check_length(17)
    model.check_length(16)


def test_positions_after_equals_a_loop():
    rng = np.random.default_rng(0)
    start, reset, weights = rng.integers(0, 9, 5), rng.random((5, 12)) < 0.2, rng.random((5, 12)) < 0.8
    got = positions_after(jnp.asarray(start), jnp.asarray(reset), jnp.asarray(weights))
    for b in range(5):
        position = start[b]
        for t in range(12):
            position = 0 if reset[b, t] else position
            assert got[b, t] == position
            position += weights[b, t]


def test_padding_of_the_vocabulary_is_never_likely():
    model, params = model_and_params()
    assert params["params"]["embed"]["embedding"].shape == (56, 32)
    out = logits(model, params)
    assert bool(jnp.isneginf(out[..., 50:]).all()) and bool(jnp.isfinite(out[..., :50]).all())


@pytest.mark.parametrize("tied", [True, False])
def test_merged_adapters_compute_the_same(tied):
    model, params = model_and_params(tie_embeddings=tied)
    lora = init_lora(jax.random.key(3), params["params"], 2, r".*kernel")
    assert ("head" in lora) != tied
    lora = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(4), a.shape), lora)
    with_lora = logits(model, {**params, "lora": lora})
    merged = logits(model, {"params": merge(params["params"], lora)})
    np.testing.assert_allclose(with_lora[..., :50], merged[..., :50], atol=1e-4)
    assert float(jnp.abs(with_lora - logits(model, params))[..., :50].max()) > 1e-2


def test_dropout_is_the_same_scanned_unrolled_and_rematerialised():
    changes = dict(attention=dict(num_heads=4, dropout=0.3), mlp=dict(dropout=0.3), dropout=0.3)
    outs = []
    for form in (dict(scan=True), dict(scan=False), dict(remat="full")):
        model, params = model_and_params(**changes, **form)
        outs.append(logits(model, params, key=jax.random.key(7))[..., :50])
    np.testing.assert_allclose(outs[0], outs[1], atol=1e-5)
    np.testing.assert_allclose(outs[0], outs[2], atol=1e-5)
    model, params = model_and_params(**changes)
    assert float(jnp.abs(outs[0] - logits(model, params)[..., :50]).max()) > 1e-2


def test_parameter_names():
    _, params = model_and_params(prefix=("attention/mlp",), num_layers=3, tie_embeddings=False)
    names = named_leaves(params)
    for name in ("embed/embedding", "head/kernel", "final_norm/scale", "stack/prefix_0/norm0/scale",
                 "stack/pattern_0/attention/query/kernel"):
        assert name in names
    assert names["stack/pattern_0/mlp/gate/kernel"].shape == (2, 32, 128)


@pytest.mark.parametrize("given, message", [
    (dict(embed_dims=3), "config.model has no field 'embed_dims'; did you mean 'embed_dim'?"),
    (dict(pattern=("atention/mlp",)), "did you mean 'attention'?"),
    (dict(attention=dict(num_heads=5)), "num_heads=5 does not divide embed_dim=256"),
    (dict(attention=dict(num_heads=4, num_kv_heads=3)), "num_kv_heads=3 must divide num_heads=4"),
    (dict(attention=dict(num_head=4)), "config.model.attention has no field 'num_head'; did you mean 'num_heads'?"),
    (dict(num_layers=5, pattern=("attention/mlp", "mlp")), "must be 0 (prefix) plus a multiple of 2 (pattern)"),
    (dict(mlp=dict(activation="swigloo")), "did you mean 'swiglu'?"),
    (dict(other=dict(num_heads=2)), "'other'"),
    (dict(norm="batch"), "config.model.norm must be"),
    (dict(attention=3), "config.model.attention must be a group of fields of that layer; got 3"),
    (dict(pattern=()), "config.model.pattern is empty"),
    (dict(attention=dict(num_heads=4, rope_theta=0.0)), "attention.rope_theta=0.0 must be above 0"),
    (dict(dropout=1.0), "config.model.dropout=1.0 must be at least 0 and below 1"),
    (dict(mlp=dict(dropout=-0.1)), "config.model.mlp.dropout=-0.1 must be at least 0 and below 1"),
    (dict(softcap=0.0), "config.model.softcap=0.0 must be above 0, or None for none"),
    (dict(random_positions=2**31), "random_positions=2147483648 must be at most 1073741824"),
    (dict(embed_std=-1.0), "config.model.embed_std=-1.0 must be above 0"),
])
def test_mistakes_are_named(given, message):
    with pytest.raises(ValueError) as error:
        resolve_model({"attention": dict(num_heads=4), **given})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_vocabulary_smaller_than_the_tokenizers_is_refused():
    with pytest.raises(ValueError, match="smaller than the tokenizer's 50"):
        build_model({**BASE, "vocab_size": 40}, 50)


def test_float64_is_not_silently_float32():
    with pytest.raises(ValueError, match="JAX_ENABLE_X64=1"):
        build_model({**BASE, "dtype": "float64"}, 50)


def test_resolving_twice_changes_nothing():
    once = resolve_model(BASE)
    assert resolve_model(once) == once
