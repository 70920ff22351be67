"""Optimizer state is split over the mesh as the parameters are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.core.sharding import make_mesh
from lm.core.tree import named_leaves
from lm.optim.builder import build_optimizer
from lm.optim.options import OPTIMIZERS, OptimizerOptions
from lm.optim.state_sharding import bytes_per_device, map_owned, opt_state_shardings

SPECS = {"params": {"embed": {"embedding": PartitionSpec("tensor", "fsdp")},
                    "stack": {"pattern_0": {"mlp": {"kernel": PartitionSpec(None, "fsdp", "tensor"),
                                                    "bias": PartitionSpec()},
                                            "square": {"kernel": PartitionSpec(None, "fsdp", "tensor")}}}}}
SHAPES = {"params": {"embed": {"embedding": (16, 8)},
                     "stack": {"pattern_0": {"mlp": {"kernel": (3, 8, 32), "bias": (3, 32)},
                                             "square": {"kernel": (3, 8, 8)}}}}}
is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)


def placed(specs=SPECS):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    params = jax.tree.map(lambda shape, s: jax.device_put(np.ones(shape, np.float32), s), SHAPES, shardings,
                          is_leaf=is_shape)
    return mesh, shardings, params


def options(name, **given):
    return OptimizerOptions(name, adafactor_min_dim=8, momentum=0.9 if name in ("adafactor", "sgd") else None, **given)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_moment_is_split_as_its_parameter_and_stays_so(name, state_dtype):
    mesh, shardings, params = placed()
    tx = build_optimizer(options(name, state_dtype=state_dtype), params, 10).tx
    wanted = opt_state_shardings(tx, params, shardings, mesh)
    state = jax.jit(tx.init, out_shardings=wanted)(params)
    names = [n for n in named_leaves(state) if n.endswith("mlp/kernel")]
    assert names
    specs = named_leaves(jax.tree.map(lambda x: x.sharding.spec, state))
    for leaf in names:
        shape = named_leaves(state)[leaf].shape
        if shape == (3, 8, 32):
            assert specs[leaf] == PartitionSpec(None, "fsdp", "tensor"), leaf
        elif "v_row" in leaf:
            assert (shape, specs[leaf]) == ((3, 8), PartitionSpec(None, "fsdp"))
        elif "v_col" in leaf:
            assert (shape, specs[leaf]) == ((3, 32), PartitionSpec(None, "tensor"))
    with jax.set_mesh(mesh):
        _, after = jax.jit(tx.update, out_shardings=(shardings, wanted))(params, state, params)
    assert jax.tree.map(lambda x: x.sharding, after) == jax.tree.map(lambda x: x.sharding, state)


def test_square_matrices_keep_rows_and_columns_apart():
    mesh, shardings, params = placed()
    tx = build_optimizer(options("adafactor"), params, 10).tx
    specs = {name: s.spec for name, s in named_leaves(opt_state_shardings(tx, params, shardings, mesh)).items()
             if name.endswith("square/kernel")}
    row, col = (next(spec for name, spec in specs.items() if part in name) for part in ("v_row", "v_col"))
    assert (row, col) == (PartitionSpec(None, "fsdp"), PartitionSpec(None, "tensor"))


def test_moments_take_an_eighth_of_the_bytes_on_eight_devices():
    specs = {"params": {"embed": {"embedding": PartitionSpec("tensor", "fsdp")},
                        "stack": {"pattern_0": {"mlp": {"kernel": PartitionSpec(None, "fsdp", "tensor"),
                                                        "bias": PartitionSpec(None, ("fsdp", "tensor"))},
                                                "square": {"kernel": PartitionSpec(None, "fsdp", "tensor")}}}}}
    mesh, shardings, params = placed(specs)
    tx = build_optimizer(options("adamw"), params, 10).tx
    state = jax.jit(tx.init, out_shardings=opt_state_shardings(tx, params, shardings, mesh))(params)
    scalars = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim == 0)
    moments = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert bytes_per_device(state) == moments // 8 + scalars
    assert bytes_per_device(params) * 2 == moments // 8


def test_updates_are_the_same_on_the_mesh_as_on_one_device():
    mesh, shardings, params = placed()
    alone = jax.tree.map(np.asarray, params)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), alone)
    for name in OPTIMIZERS:
        tx = build_optimizer(options(name, learning_rate=1.0, warmup_steps=0), params, 10).tx
        one = lambda grads, params, tx=tx: tx.update(grads, tx.init(params), params)[0]
        want = jax.jit(one)(grads, alone)
        with jax.set_mesh(mesh):
            got = jax.jit(lambda g, p, one=one: one(g, p))(jax.device_put(grads, shardings), params)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=name)


def test_owner_is_found_by_path():
    state = {"mu": {"a": {"w": jnp.zeros(2)}}, "count": jnp.zeros(())}
    got = map_owned(lambda name, leaf, *owner: (name, *owner), state, {"a": {"w": "parameter"}}, {"a": {"w": "spec"}})
    assert got == {"mu": {"a": {"w": ("mu/a/w", "parameter", "spec")}}, "count": ("count",)}
