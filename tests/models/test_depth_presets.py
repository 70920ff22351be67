"""The published size has the parameters of its shapes, to the unit. Nothing is allocated."""

import pathlib

import pytest
from flax import linen as nn

from launch import config as configs
from lm.core.tree import num_params
from lm.models.build import abstract_params, build_model
from lm.models.plan import rows

PRESET = pathlib.Path(__file__).resolve().parent.parent.parent / "experiments" / "presets" / "recurrent_depth.py"


@pytest.mark.parametrize("size, shape", [
    ("huginn", (5280, 17_920, 8)), pytest.param("small", (1024, 3520, 6), marks=pytest.mark.slow)])
def test_parameters_are_those_of_the_shapes(size, shape):
    """A block has four projections with biases on two, three matrices of the MLP and four norms; then the adapter from
    2 D, one norm in two places, and the tied table."""
    D, inner, blocks = shape
    config = configs.load(f"{PRESET}:{size}")
    model = build_model(config.model.to_dict(), 256)
    count = num_params(nn.meta.unbox(abstract_params(model)))
    assert count == blocks * (4 * D * D + 2 * D + 3 * D * inner + 4 * D) + 2 * D * D + D + 65_536 * D
    if size == "huginn":
        assert count == 3_564_976_800 == pytest.approx(3.51e9, rel=0.02)
        # Geiping et al.: 1.5 billion before and after the core, 1.5 in it, half a billion of embeddings.
        table = {row.name: row for row in rows(model, 4096)}
        core = sum(row.total for name, row in table.items() if name.endswith(", x 33"))
        assert core == pytest.approx(1.58e9, rel=0.05) and table["all"].count == 8
        # Twice the parameters of everything once but the lookup, and of the core 33 times; attention sees half a row.
        once = count - core
        seen = 4 * D * 4097 / 2
        assert table["all"].flops == pytest.approx(2 * (once + 33 * core) + seen * (4 + 33 * 4), rel=2e-3)


def test_unknown_sizes_are_listed():
    with pytest.raises(ValueError, match="huginn, small"):
        configs.load(f"{PRESET}:tiny")
