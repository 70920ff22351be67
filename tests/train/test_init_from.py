"""Taking over another run's parameters, layer by layer."""

import jax
import numpy as np
import pytest

from lm.core.depth import layer_names
from lm.core.tree import named_leaves
from lm.models.build import build_model, init_params
from lm.train.init_from import take_over

BASE = dict(embed_dim=16, num_layers=4, attention=dict(num_heads=2), mlp=dict(mlp_dim=24), dtype="float32")


def params(seed, **changes):
    return init_params(build_model({**BASE, **changes}, 50), jax.random.key(seed))


def host(tree):
    return jax.tree.map(np.asarray, tree)


def test_layers_are_matched_by_depth_between_prefix_and_pattern():
    old, new = params(0), params(1, prefix=("attention/mlp",), pattern=("attention/mlp", "attention/mlp"), num_layers=5)
    taken, report = take_over(new, host(old))
    old, taken, new = named_leaves(old), named_leaves(taken), named_leaves(new)
    kernel = "mlp/up/kernel"
    whole = old[f"stack/pattern_0/{kernel}"]
    np.testing.assert_array_equal(taken[f"stack/prefix_0/{kernel}"], whole[0])
    np.testing.assert_array_equal(taken[f"stack/pattern_0/{kernel}"], whole[jax.numpy.array([1, 3])])
    np.testing.assert_array_equal(taken[f"stack/pattern_1/{kernel}"][0], whole[2])
    np.testing.assert_array_equal(taken[f"stack/pattern_1/{kernel}"][1], new[f"stack/pattern_1/{kernel}"][1])
    assert f"stack/layer_4/{kernel}" in report.missing and not report.unused
    assert "taken over" in str(report)


def test_shapes_that_differ_start_fresh_and_are_named():
    old, new = params(0), params(1, mlp=dict(mlp_dim=32))
    taken, report = take_over(new, host(old))
    assert any(line.startswith("stack/layer_0/mlp/up/kernel (16, 24) -> (16, 32)") for line in report.mismatched)
    np.testing.assert_array_equal(named_leaves(taken)["stack/pattern_0/mlp/up/kernel"],
                                  named_leaves(new)["stack/pattern_0/mlp/up/kernel"])
    np.testing.assert_array_equal(named_leaves(taken)["embed/embedding"], named_leaves(old)["embed/embedding"])


def test_nothing_in_common_is_an_error():
    with pytest.raises(ValueError, match="no parameter of the other run fits"):
        take_over(params(0), {"params": {"other": np.zeros(3)}})
    narrow = {"stack": {"prefix_0": {"mlp": {"up": {"kernel": np.zeros((8, 24))}}}}}
    with pytest.raises(ValueError, match=r"stack/layer_0/mlp/up/kernel \(8, 24\) -> \(16, 24\)"):
        take_over(params(0), narrow)


def test_every_layer_has_its_own_name():
    names = layer_names(named_leaves(params(0, prefix=("mlp",), num_layers=5)))
    flat = [name for places in names.values() for name, _ in places]
    assert len(flat) == len(set(flat))
    assert {name.split("/")[1] for name in flat if name.startswith("stack/")} == {f"layer_{i}" for i in range(5)}
