"""What is true of the GPU kernels of product_key_topk besides their contract: ids are the reference's, ties too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu import stated_gpu
from pallas_kernels.gpu_testing import can_interpret, interpreted_gpu
from pallas_kernels.product_key_topk import product_key_topk
from pallas_kernels.product_key_topk.gpu_layout import parts

KERNELS = [pytest.param("pallas_triton"), *[pytest.param("pallas_mosaic_gpu", marks=pytest.mark.slow)]
           * can_interpret("pallas_mosaic_gpu")]


def ids(implementation, k, queries, keys):
    return jax.jit(functools.partial(product_key_topk, k=k, implementation=implementation))(
        *queries, *keys)[1]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("per_head,n,k", [(False, 9, 5), pytest.param(True, 70, 17, marks=pytest.mark.slow)])
def test_ids_are_those_of_the_reference(kernel, per_head, n, k):
    """Small whole numbers: most sums occur several times, and exactly."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.integers(-1, 2, shape), jnp.float32)
    heads = (2,) if per_head else ()
    queries, keys = [draw(1, 5, 2, 2) for _ in range(2)], [draw(*heads, n, 2) for _ in range(2)]
    with interpreted_gpu(kernel):
        got = jax.block_until_ready(ids(kernel, k, queries, keys))
    np.testing.assert_array_equal(got, ids("reference", k, queries, keys))


def test_what_does_not_fit_is_said():
    q, c = jnp.ones((1, 1, 1, 8)), jnp.ones((65, 8))
    with stated_gpu((8, 0)), pytest.raises(ValueError, match="k up to 64, not 65"):
        product_key_topk(q, q, c, c, 65, implementation="pallas_triton")
    wide = jnp.ones((1, 1, 1, 512)), jnp.ones((4, 512))
    with stated_gpu((9, 0)), pytest.raises(ValueError, match="k=2 and sub-keys of 512 do not fit"):
        product_key_topk(wide[0], wide[0], wide[1], wide[1], 2, implementation="pallas_mosaic_gpu")


def test_a_sum_is_split_into_equal_parts():
    assert [parts(1, 4), parts(8, 1000), parts(1000, 12), parts(100, 7)] == [4, 50, 1, 1]
