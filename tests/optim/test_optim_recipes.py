"""What the published recipes say about each parameter, by literal numbers, stacked layers included."""

import pytest
from flax import linen as nn

from lm.models.build import abstract_params, build_model
from lm.optim.builder import build_optimizer
from lm.optim.options import OptimizerOptions
from lm.optim.recipes import RECIPES
from lm.optim.rules import table
from lm.optim.schedules import make_schedule


def rows(recipe, **model):
    model = build_model(dict(embed_dim=64, norm="layer", tie_embeddings=False, **model), 100)
    shapes = nn.meta.unbox(abstract_params(model))
    options = OptimizerOptions(**RECIPES[recipe])
    options.check()
    build_optimizer(options, shapes, 10)
    return {row.name: (row.lr_multiplier, row.weight_decay) for row in table(options, shapes)}



def test_rwkv4_has_no_decay_and_three_rates():
    said = rows("rwkv4", num_layers=3, pattern=("rwkv4/channel_mix",), channel_mix=dict(version=4))
    assert {name for name, row in said.items() if row == (2.0, 0.0)} == {"stack/pattern_0/rwkv4/decay"}
    assert {name for name, row in said.items() if row == (3.0, 0.0)} == {"stack/pattern_0/rwkv4/bonus"}
    assert set(said.values()) == {(1.0, 0.0), (2.0, 0.0), (3.0, 0.0)}


def test_rwkv7_decays_wide_matrices_alone():
    said = rows("rwkv7", num_layers=3, prefix=("rwkv7_first/channel_mix",), pattern=("rwkv7/channel_mix",),
                rwkv7_first=dict(kind="rwkv7", value_residual=False), channel_mix=dict(version=7))
    matrices = {f"{layer}/{name}/kernel" for layer in ("stack/prefix_0/rwkv7_first", "stack/pattern_0/rwkv7")
                for name in ("receptance", "key", "value", "out")}
    matrices |= {f"stack/{block}/channel_mix/{name}/kernel" for block in ("prefix_0", "pattern_0")
                 for name in ("key", "value")}
    assert {name for name, row in said.items() if row[1]} == {*matrices, "embed/embedding", "head/kernel"}
    assert {row[1] for row in said.values()} == {0.0, 1e-3}
    assert {name for name, row in said.items() if row[0] != 1} == {
        "stack/prefix_0/rwkv7_first/decay", "stack/pattern_0/rwkv7/decay"}
    assert {row[0] for row in said.values()} == {1.0, 2.0}


@pytest.mark.parametrize("name, numbers", [("rwkv4", (0.9, 0.99, 1e-8, 1.0)), ("rwkv7", (0.9, 0.99, 1e-18, 1.0))])
def test_adam_of_the_recipes(name, numbers):
    options = OptimizerOptions(**RECIPES[name])
    assert (options.b1, options.b2, options.eps, options.clip_norm) == numbers
    made = make_schedule(OptimizerOptions(**RECIPES[name] | dict(learning_rate=6e-4, warmup_steps=10)), 100)
    assert float(made(0)) == pytest.approx(1.2e-4) and float(made(9)) == pytest.approx(6e-4)
