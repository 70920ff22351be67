"""The residual block: pre-normed layers, summed one after another into the stream; as a sandwich, sums normed too."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.sharding import constrain
from lm.core.types import Array, Aux, Context, State
from lm.layers.learned_state import run_from


class Block(nn.Module):
    """x + layer_0(norm_0(x)), then the same with layer_1, and so on.

    layers: one Module a layer (token mixer, channel mixer, ...). names: their parameter names, distinct. norm: the
    template of every norm. A layer that returns `aux["publish"]` makes those values part of `ctx.shared` for the
    layers after it; what was published first stays. `aux["tally"]` of its layers (see `lm.core.tally`) stays nested by
    their names. A `state` collection holds initial states that are learned. sandwich: every sum is normed as well, so
    that the stream cannot grow however often a block is run (Geiping et al. 2025, section 3.2). branch: what the output
    of a layer is multiplied by before it is added.
    """

    layers: tuple[nn.Module, ...]
    names: tuple[str, ...]
    norm: nn.Module
    sandwich: bool = False
    branch: float = 1.0

    def initial_state(self, batch_size: int, embed_dim: int, dtype: Any, *, capacity: int = 0) -> State:
        """The states of its layers."""
        return tuple(l.initial_state(batch_size, embed_dim, dtype, capacity=capacity) for l in self.layers)

    def flops_per_token(self, embed_dim: int, seq_len: int) -> float:
        """Forward FLOPs a token of its layers; norms are not counted."""
        return sum(l.flops_per_token(embed_dim, seq_len) for l in self.layers)

    @nn.compact
    def __call__(self, x: Array, state: State, ctx: Context) -> tuple[Array, State, Aux]:
        after, report, published, tally = [], {}, {}, {}
        for n, (layer, name, before) in enumerate(zip(self.layers, self.names, state, strict=True)):
            key = None if ctx.key is None else jax.random.fold_in(ctx.key, n)
            inner = ctx._replace(key=key, shared={**published, **ctx.shared})
            # A template is copied before it is bound: two uses of one instance would silently share parameters.
            call, normed = layer.copy(name=name), self.norm.copy(name=f"norm{n}")(x)
            if self.has_variable("state", name):
                y, s, aux = run_from(call, self.get_variable("state", name), normed, before, inner)
            else:
                y, s, aux = call(normed, before, inner)
            y = y if self.branch == 1.0 else y * jnp.asarray(self.branch, y.dtype)
            x = constrain(x + y, "batch", "length", "activation_embed")
            if self.sandwich:
                x = self.norm.copy(name=f"norm{n}_after")(x)
            after.append(s)
            published = {**aux.get("publish", {}), **published}
            report |= {f"{name}/{k}": v for k, v in aux.items() if k not in ("publish", "tally")}
            if "tally" in aux:
                tally[name] = aux["tally"]
        if published:
            report["publish"] = published
        if tally:
            report["tally"] = tally
        return x, tuple(after), report
