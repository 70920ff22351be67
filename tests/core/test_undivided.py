"""Parameters that no axis of a mesh divides are counted, with the size that would."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.undivided import undivided


def boxed(shape, *axes):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)


TREE = {"up": boxed((60, 64), "embed", "mlp"), "head": boxed((128, 60), "vocab", "embed"),
        "norm": boxed((60,), "activation_embed"), "step": jax.ShapeDtypeStruct((4,), jnp.float32)}


def test_what_divides_is_not_named():
    assert undivided(TREE, dict(data=3, fsdp=4, tensor=8)) == []
    assert undivided(TREE, dict(data=7)) == []


def test_an_axis_that_divides_nothing_of_a_parameter_is_named_with_what_would():
    (one,) = undivided(TREE, dict(data=2, fsdp=8, tensor=8))
    assert (one.axis, one.dims, one.whole, one.total, one.divisor) == ("fsdp", {"embed": 60}, 3840 + 7680, 11584, 4)
    assert str(one) == ("mesh.fsdp=8 does not divide embed=60: every device holds 11,520 of 11,584 parameters "
                        "undivided by it; the largest part of it that does is 4: mesh.fsdp=4 and mesh.data=2 times as "
                        "large")
    assert "largest part" not in str(undivided(TREE, dict(fsdp=7))[0])


def test_another_dimension_that_the_axis_divides_is_enough():
    tree = {"both": boxed((60, 64), "heads", "mlp")}
    assert undivided(tree, dict(tensor=16)) == []
    assert undivided(tree, dict(tensor=24))[0].divisor == 12


def test_a_hundredth_of_the_parameters_is_not_worth_a_word():
    tree = {"large": boxed((64, 1000), "embed", "mlp"), "small": boxed((1, 4), "kv_heads", "embed")}
    assert undivided({"small": tree["small"]}, dict(fsdp=8))
    assert undivided(tree, dict(fsdp=8)) == []
