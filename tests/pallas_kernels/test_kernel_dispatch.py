"""Choosing an implementation is loud."""

import logging

import jax
import pytest

from pallas_kernels import dispatch
from pallas_kernels.dispatch import automatic_axes, choose, current_platform, stated_platform

CHECKS = {
    "pallas_tpu": lambda platform: None if platform == "tpu" else f"it needs a TPU and this is {platform}",
    "chunked": lambda platform: None,
    "reference": lambda platform: None,
}


@pytest.fixture(autouse=True)
def nothing_announced():
    dispatch._announce.cache_clear()


def test_none_is_the_first_that_serves_and_says_why():
    assert choose("op", None, CHECKS, "tpu") == "pallas_tpu"
    assert choose("op", None, CHECKS, "cpu") == "chunked"


def test_a_choice_is_logged_once_with_the_reasons(caplog):
    with caplog.at_level(logging.INFO, "pallas_kernels.dispatch"):
        for _ in range(3):
            choose("op", None, CHECKS, "cpu")
        choose("other", "reference", CHECKS, "cpu")
    assert caplog.messages == ["op runs as 'chunked' on cpu (not 'pallas_tpu': it needs a TPU and this is cpu)",
                               "other runs as 'reference' on cpu"]


def test_a_name_works_or_says_why_not():
    assert choose("op", "reference", CHECKS, "tpu") == "reference"
    with pytest.raises(ValueError, match=r"op cannot run on cpu as 'pallas_tpu': .*it needs a TPU and this is cpu"):
        choose("op", "pallas_tpu", CHECKS, "cpu")


def test_a_tuple_is_tried_in_turn():
    assert choose("op", ("pallas_tpu", "reference"), CHECKS, "cpu") == "reference"
    assert choose("op", ("pallas_tpu", "reference"), CHECKS, "tpu") == "pallas_tpu"
    with pytest.raises(ValueError, match="names none"):
        choose("op", (), CHECKS, "cpu")


@pytest.mark.parametrize("names", ["chuncked", ("reference", "chuncked")])
def test_an_unknown_name_is_an_error_wherever_it_stands(names):
    with pytest.raises(ValueError, match=r"op has no implementation 'chuncked'; did you mean 'chunked'\?; "
                       r"implementations: pallas_tpu, chunked, reference"):
        choose("op", names, CHECKS, "cpu")


def test_platform_of_an_abstract_mesh_of_another_device():
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    assert current_platform() == "cpu"
    with jax.sharding.use_abstract_mesh(mesh):
        assert current_platform() == "tpu"


def test_platform_of_a_concrete_mesh():
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        assert current_platform() == "cpu"


def test_a_stated_platform_ends():
    with pytest.raises(RuntimeError), stated_platform("tpu"):
        assert current_platform() == "tpu"
        raise RuntimeError
    assert current_platform() == "cpu"


def test_a_kernel_is_not_left_to_the_partitioner():
    assert automatic_axes() is None
    seen = []

    def local(x):
        seen.append(automatic_axes())
        return x

    with jax.set_mesh(jax.make_mesh((2, 1), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2)):
        assert automatic_axes() == "mesh axes data=2 are not manual: call it inside jax.shard_map"
        spec = jax.sharding.PartitionSpec("data")
        jax.shard_map(local, in_specs=spec, out_specs=spec)(jax.numpy.ones(2))
    assert seen == [None]
