"""The table of a model's costs against the parameters that it really has, and counts by hand."""

import types

import jax
import pytest
from flax import linen as nn

from lm.core.sharding import make_mesh
from lm.core.tree import num_params
from lm.layers.experts.product_keys import ProductKeys
from lm.models.build import abstract_params, build_model, check_mesh, init_params
from lm.models.plan import format_rows, parameter_bytes, rows

MODEL = dict(embed_dim=16, num_layers=5, prefix=("attention/moe",), pattern=("attention/mlp", "peer/pkm"),
             attention=dict(num_heads=2), mlp=dict(mlp_dim=8), moe=dict(num_experts=4, top_k=2, mlp_dim=8),
             peer=dict(num_experts=64, num_heads=2, top_k=3, key_dim=4, activation="geglu"),
             pkm=dict(num_values=64, num_heads=2, top_k=3, key_dim=4), vocab_multiple=1)


def test_rows_hold_every_parameter_and_what_a_token_uses_of_it():
    model = build_model(MODEL, 10)
    table = {row.name: row for row in rows(model, 32)}
    total = num_params(nn.meta.unbox(abstract_params(model)))
    assert table["all"].total == total == sum(row.total for name, row in table.items() if name != "all")
    router = 2 * 4 * 16 + 2 * 8  # kernel, scale and bias
    assert table["peer"][1:5] == (2, 2 * (router + 2 * 8 * 2 + 64 * 3 * 16), 2 * (router + 2 * 8 * 2 + 6 * 3 * 16), 6)
    assert table["pkm"][1:5] == (2, 2 * (router + 2 * 2 * 8 * 2 + 64 * 16), 2 * (router + 2 * 2 * 8 * 2 + 6 * 16), 6)
    assert table["moe"][1:5] == (1, 16 * 4 + 4 * 2 * 16 * 8, 16 * 4 + 2 * 2 * 16 * 8, 2)
    assert table["peer"].flops == 2 * (2 * 8 * 16 + 2 * 8 * 8 + 6 * 6 * 16)
    assert table["mlp"].active == table["mlp"].total == 2 * 2 * 16 * 8
    assert table["all"].flops == model.flops_per_token(32) == sum(
        row.flops for name, row in table.items() if name != "all")
    assert len({len(line) for line in format_rows(list(table.values())).splitlines()}) == 1


@pytest.mark.parametrize("query_norm", ["batch", "layer", "l2", "none"])
@pytest.mark.parametrize("own", [True, False])
def test_router_counts_its_parameters(query_norm, own):
    router = ProductKeys(49, 2, 3, 6, query_norm, "softmax", own, 0.9)
    made = jax.eval_shape(lambda: nn.meta.unbox(router.init(jax.random.key(0), 10)))
    assert num_params(made) == router.num_params(10)


@pytest.mark.slow
def test_bytes_of_a_device_are_those_that_it_holds():
    model, sizes = build_model(MODEL, 10), {"data": 2, "expert": 2, "tensor": 2}
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        params = init_params(model, jax.random.key(0), mesh)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    assert parameter_bytes(model, dict(mesh.shape)) == held


def test_a_mesh_that_cannot_split_the_experts_is_refused():
    with pytest.raises(ValueError, match=r"moe\.num_experts=4 is not divided by the mesh axis expert=8"):
        check_mesh(build_model(MODEL, 10), types.MappingProxyType({"expert": 8}))
