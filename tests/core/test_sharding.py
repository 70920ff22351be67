"""Meshes and partitions from logical axes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from lm.core.axes import MESH_AXES
from lm.core.sharding import (
    check_batch,
    constrain,
    current_mesh,
    make_mesh,
    platform,
    resolve_mesh_shape,
    spec,
)


def test_minus_one_fills():
    assert resolve_mesh_shape({"data": -1, "tensor": 2}, 8) == dict(data=4, fsdp=1, expert=1, context=1, tensor=2)
    assert tuple(make_mesh({"data": -1}).shape) == MESH_AXES


@pytest.mark.parametrize("sizes, message", [
    ({"model": 2}, "no axis 'model'"), ({"data": 3}, "needs 3 devices and there are 8"),
    ({"data": -1, "fsdp": -1}, "one of them may be -1"), ({"data": 0}, "at least 1"),
    ({"data": -1, "tensor": 3}, "needs a multiple of 3 devices")])
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes)


def test_slices_multiply_axes():
    mesh = make_mesh({"fsdp": 4}, dcn={"data": 2})
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == (2, 4)
    # The devices of a slice stand together: fsdp never crosses the slow network.
    ids = [[d.id for d in row.flat] for row in mesh.devices.reshape(2, 4)]
    assert {tuple(sorted(row)) for row in ids} == {(0, 1, 2, 3), (4, 5, 6, 7)}


def test_partitions():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert spec(("embed", "mlp"), (8, 8), mesh) == PartitionSpec("fsdp", "tensor")
    assert spec(("layers", "mlp", "embed"), (3, 8, 8), mesh) == PartitionSpec(None, "tensor", "fsdp")
    assert spec(("batch", "length"), (8, 4), mesh) == PartitionSpec(("data", "fsdp"), None)
    assert spec(("embed", "embed"), (8, 8), mesh) == PartitionSpec("fsdp", None), "a mesh axis is used once"
    assert spec(("kv_heads",), (3,), mesh) == PartitionSpec(None), "what does not divide stays whole"
    with pytest.raises(ValueError, match="unknown logical axis 'depth'"):
        spec(("depth",), (8,), mesh)


def test_constrain_is_the_identity_without_a_mesh_and_splits_with_one():
    x = jnp.ones((8, 4))
    assert constrain(x, "batch", "length") is x and current_mesh() is None
    mesh = make_mesh({"data": 8})
    with jax.set_mesh(mesh):
        assert jax.jit(lambda x: constrain(x * 1, "batch", "length"))(x).sharding.spec[0] == "data"


def test_batches_that_cannot_be_split():
    mesh = make_mesh({"data": 2, "fsdp": 2, "context": 2})
    check_batch(8, 16, mesh, 2)
    with pytest.raises(ValueError, match="use a multiple of 8"):
        check_batch(12, 16, mesh, 2)
    with pytest.raises(ValueError, match="seq_len=15 must be divisible by mesh axis context=2"):
        check_batch(8, 15, mesh)


def test_platform_of_this_machine():
    assert platform() == "cpu"
