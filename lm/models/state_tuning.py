"""The learned initial states of a model: `variables["state"]`, a small tree beside the parameters.

Its names are those of the layers: `state/stack/prefix_0/rwkv7_first/wkv` [H, K, K], and with the repeats in front,
`state/stack/pattern_0/rwkv7/wkv` [R, H, K, K], for a scanned stack and an unrolled one alike.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lm.layers.block import Block
from lm.layers.learned_state import initial
from lm.models.decoder import DecoderLM


def init_states(model: DecoderLM) -> dict[str, Any]:
    """The tree before training: every recurrent layer with no past, so that the model computes what it did before. (Of
    RWKV-4 that is nearly so: its average of nothing has a small weight, see `lm.layers.learned_state.LOG_WEIGHT`.)

    Raises ValueError for a model without recurrent layers.
    """
    if type(model) is not DecoderLM:
        raise ValueError("train.state_tuning trains one initial state a layer, and the core of model.recurrent_depth "
                         "has one for each iteration; use train.lora_rank to adapt this model")
    stack = model.stack
    repeated = lambda tree: jax.tree.map(lambda a: jnp.broadcast_to(a, (stack.repeats, *a.shape)), tree)
    blocks = {f"prefix_{n}": _of_block(block, model.embed_dim) for n, block in enumerate(stack.prefix)}
    blocks |= {f"pattern_{n}": repeated(_of_block(block, model.embed_dim)) for n, block in enumerate(stack.pattern)
               if stack.repeats}
    found = {name: states for name, states in blocks.items() if states}
    if not found:
        raise ValueError("train.state_tuning trains the initial states of recurrent layers, and this model has none; "
                         "use train.lora_rank to adapt other layers")
    return {"stack": found}


def _of_block(block: Block, embed_dim: int) -> dict[str, Any]:
    made = {name: initial(layer, embed_dim) for name, layer in zip(block.names, block.layers, strict=True)}
    return {name: state for name, state in made.items() if state}
