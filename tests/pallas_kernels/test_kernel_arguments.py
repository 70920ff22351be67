"""Errors name the argument, its shape and the rule."""

import jax.numpy as jnp
import pytest

from pallas_kernels.arguments import check_dtypes, check_shapes


def test_sizes_are_those_of_the_first_argument_with_the_letter():
    assert check_shapes("op", a=(jnp.zeros((2, 3)), "B T"), h=(jnp.zeros((2, 5)), "B C")) == {"B": 2, "T": 3, "C": 5}


@pytest.mark.parametrize("shape,message", [
    ((2, 3), r"op: b has shape \(2, 3\); it must be \[B, T, C\]$"),
    ((2, 4, 4), r"op: b has shape \(2, 4, 4\); it must be \[B, T, C\] with T=3 as in the arguments before it"),
    ((0, 3, 4), r"op: b has shape \(0, 3, 4\); it must be \[B, T, C\] with B=2"),
])
def test_wrong_shapes(shape, message):
    with pytest.raises(ValueError, match=message):
        check_shapes("op", a=(jnp.zeros((2, 3)), "B T"), b=(jnp.zeros(shape), "B T C"))


def test_no_size_may_be_zero():
    with pytest.raises(ValueError, match=r"op: a has shape \(2, 0\); it must be \[B, T\] with T at least 1"):
        check_shapes("op", a=(jnp.zeros((2, 0)), "B T"))


def test_wrong_dtypes():
    assert check_dtypes("op", ("float32",), a=jnp.zeros(2), b=jnp.zeros(3)) == "float32"
    with pytest.raises(ValueError, match=r"op: a\[2\] has dtype int32; allowed: float32, bfloat16"):
        check_dtypes("op", ("float32", "bfloat16"), a=jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"op: b\[2\] has dtype bfloat16; it must be that of a, float32"):
        check_dtypes("op", ("float32", "bfloat16"), a=jnp.zeros(2), b=jnp.zeros(2, jnp.bfloat16))
