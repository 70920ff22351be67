"""The race detector has to catch a race: a test that asserts "no race" proves nothing otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.batching import merged_into_batch
from pallas_kernels.dispatch import current_platform
from pallas_kernels.testing import RaceFoundError, interpreted_tpu


def copied(x, wait_before_reading: bool):
    """x + 1 through a DMA into VMEM, which has to be waited for before it is read."""
    def kernel(x_hbm, out, scratch, semaphore):
        copy = pltpu.make_async_copy(x_hbm, scratch, semaphore)
        copy.start()
        if wait_before_reading:
            copy.wait()
        out[...] = scratch[...] + 1
        if not wait_before_reading:
            copy.wait()

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
                          in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
                          scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA])(x)


def test_a_read_before_its_copy_arrived_is_a_race():
    with pytest.raises(RaceFoundError), interpreted_tpu():
        jax.block_until_ready(copied(jnp.ones((8, 128)), wait_before_reading=False))


def test_no_race_after_waiting_and_none_left_over():
    x = jnp.ones((8, 128))
    with interpreted_tpu():
        assert current_platform() == "tpu"
        np.testing.assert_array_equal(copied(x, wait_before_reading=True), x + 1)
    assert current_platform() == "cpu"


def test_an_output_that_nothing_writes_is_nan():
    kernel = lambda x, out: None
    x = jnp.ones((8, 128))
    with interpreted_tpu():
        out = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)
        assert np.isnan(out).all()


def test_vmap_merges_into_the_batch():
    """One call with more rows: mapped and unmapped arguments, None, and vmap of vmap."""
    shapes = []

    @merged_into_batch
    def function(x, y, nothing):
        shapes.append((x.shape, y.shape, nothing))
        return x + y[..., None], y

    x, y = jnp.arange(24.0).reshape(2, 3, 4), jnp.arange(3.0)
    out, same = jax.vmap(lambda x: function(x, y, None))(x)
    np.testing.assert_array_equal(out, x + y[:, None])
    np.testing.assert_array_equal(same, np.stack([y, y]))
    assert shapes[-1] == ((6, 4), (6,), None)
    z = jnp.arange(30.0).reshape(5, 2, 3)
    deep = jax.vmap(jax.vmap(lambda x, z: function(x, z, None)[0]), in_axes=(None, 0))(x, z)
    np.testing.assert_array_equal(deep, x + z[..., None])
    assert shapes[-1] == ((30, 4), (30,), None)
