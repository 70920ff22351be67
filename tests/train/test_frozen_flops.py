"""A step of adapters computes no gradient of frozen kernels: FLOPs of the program, before any optimisation."""

import jax
import pytest
from flax import linen as nn
from runs import VOCAB, B, T, packed_batch

from launch.recipe import objective_of, recipe_of
from lm.core.fields import build
from lm.core.tree import named_leaves
from lm.models.build import build_model, make_apply
from lm.optim.options import OptimizerOptions
from lm.train.options import TrainOptions
from lm.train.step import make_train_step

RANK = 2
OF_ADAPTERS = {"next_token": {"next_token": 1.0}, "orpo": {"orpo": {"odds_weight": 0.1}},
               "dpo": {"dpo": {"beta": 0.1}, "reference": "adapters_off"}}
OF_ALL = {**OF_ADAPTERS, "dpo": {"dpo": {"beta": 0.1}, "reference": "copy"}}


def counted(loss, **train):
    """(FLOPs of the train step as it is written that a batch adds, weights of the model by name)."""
    # Unrolled: of a loop the body is counted once.
    model = build_model(dict(embed_dim=64, num_layers=3, attention=dict(num_heads=4, implementation="reference"),
                             mlp=dict(activation="swiglu"), dtype="float32", scan=False), VOCAB)
    options = build(TrainOptions, dict(batch_size=B, seq_len=T, steps=4, **train), "config.train")
    recipe = recipe_of(model, options, build(OptimizerOptions, dict(warmup_steps=0), "config.optimizer"), loss)
    step = make_train_step(make_apply(model), objective_of(model, options, loss), recipe.optimizer)
    flops = []
    for rows in (B, 2 * B):  # the optimizer costs the same with both
        state, batch = jax.eval_shape(lambda: recipe.fresh(0)), jax.eval_shape(lambda: packed_batch(0))
        batch = jax.tree.map(lambda a, rows=rows: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype), batch)
        flops.append(jax.jit(step).lower(state, batch).cost_analysis()["flops"])
    return flops[1] - flops[0], named_leaves(nn.meta.unbox(recipe.boxed)["params"])


@pytest.mark.parametrize("loss", [pytest.param(name, marks=() if name == "orpo" else pytest.mark.slow)
                                  for name in OF_ADAPTERS])
def test_frozen_kernels_get_no_gradient(loss):
    """Whole training has three products a kernel, adapters two, and none for the input of the first layer; a reference
    is one more in both."""
    whole, weights = counted(OF_ALL[loss])
    adapted, _ = counted(OF_ADAPTERS[loss], lora_rank=RANK, lora_match="kernel")
    kernels = [leaf for name, leaf in weights.items() if name.endswith("kernel")]
    product = 2 * B * T * (sum(kernel.size for kernel in kernels) + weights["embed/embedding"].size)  # a tied head
    first = 2 * B * T * sum(weights[f"stack/pattern_0/attention/{name}/kernel"].size // 3
                            for name in ("query", "key", "value"))
    # [layers, in, out] gets layers (in + out) rank numbers, and three products with them.
    of_adapters = 3 * 2 * B * T * RANK * sum(kernel.shape[0] * sum(kernel.shape[1:]) for kernel in kernels)
    assert whole - adapted == pytest.approx(product + first - of_adapters, rel=0.05)
