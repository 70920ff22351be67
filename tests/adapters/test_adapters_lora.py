"""Adapters are made from shapes, change nothing at first, and merge exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.adapters.lora import init_lora, join, merge, split, unmerge
from lm.core.tree import named_leaves


class Dense(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        y = x @ self.param("kernel", nn.initializers.normal(1.0), (x.shape[-1], self.features))
        if self.has_variable("lora", "a"):
            y = y + x @ self.get_variable("lora", "a") @ self.get_variable("lora", "b")
        return y


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(Dense(12, name="query")(x))
        x = Dense(7, name="value")(x)
        head = self.param("head", lambda key: {"kernel": jax.random.normal(key, (20, 7))})
        logits = x @ head["kernel"].T
        if self.has_variable("lora", "head"):
            adapter = self.get_variable("lora", "head")
            logits = logits + x @ adapter["a"] @ adapter["b"]
        return logits


def trained(lora):
    """Adapters with a b that is not zero."""
    keys = iter(jax.random.split(jax.random.key(9), 100))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), lora)


def shapes():
    s = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    return {"embed": {"embedding": s(30, 6)},
            "stack": {"prefix_0": {"attention": {"query": {"kernel": s(6, 8), "bias": s(8)}}},
                      "pattern_0": {"attention": {"query": {"kernel": s(4, 6, 8)}, "value": {"kernel": s(4, 6, 3)}},
                                    "moe": {"up": {"kernel": s(4, 2, 6, 8)}}}},
            "head": {"kernel": s(30, 6)}}


def test_shapes_follow_the_kernels_and_the_transposed_head():
    lora = init_lora(jax.random.key(0), shapes(), 2, r"(query|head)/kernel$")
    assert {name: leaf.shape for name, leaf in named_leaves(lora).items()} == {
        "stack/prefix_0/attention/query/a": (6, 2), "stack/prefix_0/attention/query/b": (2, 8),
        "stack/pattern_0/attention/query/a": (4, 6, 2), "stack/pattern_0/attention/query/b": (4, 2, 8),
        "head/a": (6, 2), "head/b": (2, 30)}
    assert set(lora["stack"]["pattern_0"]) == {"attention"}


def test_a_has_the_variance_of_its_fan_in_times_the_scale():
    big = {"mlp": {"kernel": jax.ShapeDtypeStruct((400, 8), jnp.float32)}}
    for alpha, scale in ((None, 1.0), (32, 2.0)):
        a = init_lora(jax.random.key(0), big, 16, "mlp", alpha)["mlp"]["a"]
        assert float(a.std()) == pytest.approx(scale / 20, rel=0.05)


def test_an_adapter_does_not_depend_on_the_others_nor_on_the_number_of_layers():
    few = init_lora(jax.random.key(0), shapes(), 2, "pattern_0/attention/query")
    many = init_lora(jax.random.key(0), shapes(), 2, "attention")
    deeper = shapes()
    deeper["stack"]["pattern_0"]["attention"]["query"]["kernel"] = jax.ShapeDtypeStruct((9, 6, 8), jnp.float32)
    query = lambda lora: np.asarray(lora["stack"]["pattern_0"]["attention"]["query"]["a"])
    np.testing.assert_array_equal(query(few), query(many))
    np.testing.assert_array_equal(query(few), query(init_lora(jax.random.key(0), deeper, 2, "attention"))[:4])
    assert len({x.tobytes() for x in query(few)}) == 4, "layers must differ"
    assert not np.array_equal(query(few), query(init_lora(jax.random.key(1), shapes(), 2, "attention")))


def test_kernels_of_one_shape_get_different_adapters():
    shape = jax.ShapeDtypeStruct((6, 8), jnp.float32)
    lora = init_lora(jax.random.key(0), {"query": {"kernel": shape}, "key": {"kernel": shape}}, 2, "kernel")
    assert not np.any(lora["query"]["a"] == lora["key"]["a"])


def model():
    x = jax.random.normal(jax.random.key(3), (5, 6))
    return x, Model().init(jax.random.key(4), x)["params"]


def test_new_adapters_change_nothing_and_trained_ones_do():
    x, params = model()
    lora = init_lora(jax.random.key(0), params, 2, "kernel")
    plain = Model().apply({"params": params}, x)
    np.testing.assert_array_equal(Model().apply(join(params, lora), x), plain)
    assert np.max(np.abs(Model().apply(join(params, trained(lora)), x) - plain)) > 1


def test_merged_forward_equals_adapter_forward_and_unmerge_restores():
    x, params = model()
    lora = trained(init_lora(jax.random.key(0), params, 2, "(query|head)/kernel"))
    merged = merge(params, lora)
    np.testing.assert_allclose(Model().apply({"params": merged}, x), Model().apply(join(params, lora), x), rtol=1e-4,
                               atol=1e-4)
    back = unmerge(merged, lora)
    for name, leaf in named_leaves(params).items():
        np.testing.assert_allclose(named_leaves(back)[name], leaf, atol=1e-5, err_msg=name)
    assert merged["value"]["kernel"] is params["value"]["kernel"]


def test_stacked_adapters_merge_layer_by_layer():
    params = jax.tree.map(lambda s: jnp.asarray(np.random.default_rng(0).normal(size=s.shape), jnp.float32), shapes())
    lora = trained(init_lora(jax.random.key(0), params, 3, "query"))
    merged = jax.jit(merge)(params, lora)["stack"]["pattern_0"]["attention"]["query"]["kernel"]
    query = lora["stack"]["pattern_0"]["attention"]["query"]
    for layer in range(4):
        want = np.asarray(params["stack"]["pattern_0"]["attention"]["query"]["kernel"][layer], np.float64) + (
            np.asarray(query["a"][layer], np.float64) @ np.asarray(query["b"][layer], np.float64))
        np.testing.assert_allclose(merged[layer], want, atol=1e-5)


def test_variables_split_and_join():
    assert split(join({"w": 1}, {"a": 2})) == ({"w": 1}, {"a": 2})
    assert join({"w": 1}, {}) == {"params": {"w": 1}}
    assert split({"params": {"w": 1}}) == ({"w": 1}, {})


@pytest.mark.parametrize("match, says", [
    ("atention/quary", "no kernel is matched.*attention/query/kernel"),
    ("embed/embedding", "embedding tables and vectors have no adapter"),
    ("moe", "two dimensions a layer; stack/pattern_0/moe/up/kernel"),
])
def test_impossible_matches_are_explained(match, says):
    with pytest.raises(ValueError, match=says):
        init_lora(jax.random.key(0), shapes(), 2, match)


def test_rank_must_be_positive():
    with pytest.raises(ValueError, match="at least 1; got 0"):
        init_lora(jax.random.key(0), shapes(), 0, "query")


@pytest.mark.parametrize("change, says", [
    (lambda lora: {"quary": lora["query"]}, "nearest: query"),
    (lambda lora: {"query": {"a": lora["query"]["a"], "b": jnp.zeros((2, 3))}}, "query/kernel makes"),
    (lambda lora: {"a": lora["query"]["a"], "b": lora["query"]["b"]}, "no kernel beside it"),
])
def test_adapters_of_another_model_are_refused(change, says):
    _, params = model()
    with pytest.raises(ValueError, match=says):
        merge(params, change(init_lora(jax.random.key(0), params, 2, "query")))
