"""The published sizes have the published numbers of parameters, to the unit. Shapes only: nothing is allocated."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from launch import config as configs
from lm.core.tree import named_leaves, num_params
from lm.models.build import abstract_params, build_model
from lm.optim.recipes import RECIPES
from lm.optim.rules import table
from lm.optim.schedules import make_schedule

FOLDER = pathlib.Path(__file__).resolve().parent.parent.parent / "experiments" / "presets"

# Peng et al. 2023, table 2.
RWKV4 = {"169m": 169_342_464, "430m": 430_397_440, "1b5": 1_515_106_304, "3b": 2_984_627_200, "7b": 7_392_649_216,
         "14b": 14_148_597_760}
# Blocks, width and the inner widths of w, a, v, g as the published files have them.
RWKV7 = {"191m": (12, 768, 64, 64, 32, 128), "450m": (24, 1024, 64, 64, 32, 128), "1b5": (24, 2048, 96, 96, 64, 256),
         "2b9": (32, 2560, 96, 96, 64, 320), "7b2": (32, 4096, 128, 128, 96, 480)}
PUBLISHED7 = {"191m": 1.91e8, "450m": 4.51e8, "1b5": 1.527e9, "2b9": 2.948e9, "7b2": 7.2e9}

# Width, hidden width over width, blocks.
MIN_RNN = {"char_gru": (384, 2, 3), "char_lstm": (384, 2, 3), "copy_gru": (64, 6, 3), "copy_lstm": (64, 6, 3),
           "bytes_gru": (512, 1.5, 6), "bytes_lstm": (512, 1.5, 6)}


def resolved(name, size):
    return configs.load(f"{FOLDER / name}.py:{size}")


def shapes(config, vocab=256):
    return nn.meta.unbox(abstract_params(build_model(config.model.to_dict(), vocab)))


def mostly_slow(names, kept):
    """All names; those outside of `kept` under `-m slow`."""
    return [pytest.param(name, marks=() if name in kept else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("size", mostly_slow(RWKV4, ("14b",)))
def test_rwkv4_has_the_parameters_of_the_paper(size):
    params = shapes(resolved("rwkv4", size))
    assert num_params(params) == RWKV4[size]
    assert all(leaf.dtype == jnp.float32 for leaf in named_leaves(params).values())


@pytest.mark.parametrize("size", mostly_slow(RWKV7, ("191m",)))
def test_rwkv7_has_the_parameters_of_its_formula(size):
    """2 D V + 4 D + L D (12 D + 2 (w + a + v + g) + 19) - (2 D v + D): the first block mixes no values."""
    L, D, w, a, v, g = RWKV7[size]
    count = num_params(shapes(resolved("rwkv7", size)))
    assert count == 2 * D * 65_536 + 4 * D + L * D * (12 * D + 2 * (w + a + v + g) + 19) - (2 * D * v + D)
    assert count == pytest.approx(PUBLISHED7[size], rel=5e-3)


@pytest.mark.parametrize("name", mostly_slow(MIN_RNN, ("char_lstm",)))
def test_min_rnn_has_the_parameters_of_its_equations(name):
    """Two or three projections in, none of them recurrent, and one out."""
    width, expansion, layers = MIN_RNN[name]
    params = named_leaves(shapes(resolved("min_rnn", name)))
    kernels = sum(int(np.prod(leaf.shape)) for path, leaf in params.items()
                  if "/min_" in path and path.endswith("/kernel"))
    projections = 3 if name.endswith("gru") else 4
    assert kernels == layers * projections * width * int(width * expansion)


def test_unknown_sizes_are_listed():
    for name, known in (("rwkv4", "169m, 430m"), ("rwkv7", "191m, 450m"), ("min_rnn", "char_gru, char_lstm")):
        with pytest.raises(ValueError, match=known):
            resolved(name, "tiny")


@pytest.mark.parametrize("name, size", [
    ("rwkv4", "430m"), pytest.param("rwkv7", "450m", marks=pytest.mark.slow)])
def test_optimizer_is_the_recipe_of_the_version(name, size):
    """The recipe is tested where it stands; a preset, which may import nothing, has it word by word."""
    given = configs.read(f"{FOLDER / name}.py:{size}")["optimizer"]
    recipe = {**RECIPES[name], "rules": tuple(RECIPES[name]["rules"])}
    assert {key: given[key] for key in recipe} == recipe
    assert set(given) - set(recipe) <= {"learning_rate", "final_fraction", "warmup_steps", "decay_steps"}
    shown = resolved(name, size)
    rows = table(configs.options(shown, "optimizer"), shapes(shown))
    assert {row.lr_multiplier for row in rows} == ({1.0, 2.0, 3.0} if name == "rwkv4" else {1.0, 2.0})


def test_learning_rate_of_rwkv4_14b():
    """1e-4 for 544 mini-epochs, 7e-6 at the end, their geometric mean halfway between."""
    config = resolved("rwkv4", "14b")
    rate = make_schedule(configs.options(config, "optimizer"), config.train.steps)
    for epoch, want in ((0, 1e-4), (543, 1e-4), ((544 + 8043) / 2, 7e-10 ** 0.5), (8043, 7e-6)):
        assert float(rate(int(epoch * 315))) == pytest.approx(want, rel=1e-3)
