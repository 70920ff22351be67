"""Dense channel mixers: GELU, SwiGLU and its family, squared ReLU."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from lm.core.fields import did_you_mean
from lm.core.sharding import constrain
from lm.core.types import Array, Aux, Context, State
from lm.layers.dropout import dropout
from lm.layers.linear import Dense


def relu2(x: Array) -> Array:
    """max(x, 0)^2 (So et al. 2021, Primer)."""
    return jax.numpy.square(jax.nn.relu(x))


# name -> (nonlinearity, whether a second projection multiplies it)
ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], bool]] = {
    "gelu": (lambda x: jax.nn.gelu(x, approximate=True), False),
    "gelu_exact": (lambda x: jax.nn.gelu(x, approximate=False), False),
    "relu2": (relu2, False),
    "silu": (jax.nn.silu, False),
    "swiglu": (jax.nn.silu, True),
    "geglu": (lambda x: jax.nn.gelu(x, approximate=True), True),
    "reglu": (jax.nn.relu, True),
}


class MLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) for the gated kinds (Shazeer 2020, eq. 6).

    activation: one of gelu (tanh form), gelu_exact, relu2, silu, swiglu, geglu, reglu.
    mlp_dim: hidden width; None is 4 * embed_dim, or for gated kinds 8/3 * embed_dim rounded up to a multiple of 64,
      which gives both the same number of parameters.
    output_scale: multiplies the standard deviation of `down` at initialisation.
    """

    mlp_dim: int | None = None
    activation: str = "gelu"
    use_bias: bool = False
    dropout: float = 0.0
    output_scale: float | None = None

    def check(self, embed_dim: int) -> None:
        """Raises ValueError where the fields do not fit the width."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"mlp.activation={self.activation!r} is unknown"
                             f"{did_you_mean(self.activation, ACTIVATIONS)}; known: {', '.join(ACTIVATIONS)}")
        if self.mlp_dim is not None and self.mlp_dim < 1:
            raise ValueError(f"mlp.mlp_dim={self.mlp_dim} must be at least 1 (or None for the default)")

    def hidden_dim(self, embed_dim: int) -> int:
        """The hidden width for this embed_dim."""
        if self.mlp_dim is not None:
            return self.mlp_dim
        return -(-8 * embed_dim // 3 // 64) * 64 if ACTIVATIONS[self.activation][1] else 4 * embed_dim

    def flops_per_token(self, embed_dim: int, seq_len: int) -> float:
        """Forward FLOPs a token: two per weight of the projections."""
        return 2.0 * (3 if ACTIVATIONS[self.activation][1] else 2) * embed_dim * self.hidden_dim(embed_dim)

    def initial_state(self, batch_size: int, embed_dim: int, dtype: Any, *, capacity: int = 0) -> State:
        """Stateless."""
        return ()

    @nn.compact
    def __call__(self, x: Array, state: State, ctx: Context) -> tuple[Array, State, Aux]:
        act, gated = ACTIVATIONS[self.activation]
        hidden = self.hidden_dim(x.shape[-1])
        # Only the input of the nonlinearity is kept for the backward pass: a tanh GELU would keep six such arrays.
        act = jax.checkpoint(act)
        up = Dense(hidden, ("embed", "mlp"), self.use_bias, name="up")(x)
        h = act(Dense(hidden, ("embed", "mlp"), self.use_bias, name="gate")(x)) * up if gated else act(up)
        h = constrain(h, "batch", "length", "mlp")
        scale = 1.0 if self.output_scale is None else self.output_scale
        y = Dense(x.shape[-1], ("mlp", "embed"), self.use_bias, scale, name="down")(h)
        return dropout(y, self.dropout, ctx.key), state, {}
