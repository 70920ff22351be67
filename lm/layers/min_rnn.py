"""minGRU and minLSTM: gates that look at the input alone, so that the recurrence is a scan (Feng et al. 2024).

Shape legend: B batch, T time, D embed_dim, C hidden width.
"""

from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from lm.core.types import Array, Aux, Context
from lm.layers.conv import CausalConv
from lm.layers.linear import Dense
from lm.layers.local import over_shards
from pallas_kernels.linear_scan import min_gru, min_lstm
from pallas_kernels.linear_scan.sequence import min_gru_over_sequence, min_lstm_over_sequence


class MinRNNState(NamedTuple):
    """hidden: [B, C] float32. shift: [B, conv_width - 1, D], the convolution's last inputs (width 0 without one)."""

    hidden: Array
    shift: Array


HOLD = 1e4  # a gate's pre-activation at padding: its sigmoid is exactly 0 or 1, in float16 too


class MinRNN(nn.Module):
    """What minGRU and minLSTM share: an optional convolution, gates and candidate from x, the scan, the way back.

    hidden_dim: C; None is twice embed_dim.
    hidden_act: of the candidate, one of g (positive, the paper's log-space variant), identity, tanh.
    conv_width: width of a causal depthwise convolution before the gates (the paper's Conv4 is 4); 0 for none.
    use_bias: biases of the projections.
    output_scale: multiplies the standard deviation of `out` at initialisation.
    implementation: of the scan; None is the best for the platform, logged once.
    """

    hidden_dim: int | None = None
    hidden_act: Literal["g", "identity", "tanh"] = "g"
    conv_width: int = 0
    use_bias: bool = False
    output_scale: float | None = None
    implementation: str | None = None

    gates: ClassVar  # names, and what each is at padding
    kind: ClassVar[str]

    def check(self, embed_dim: int) -> None:
        """Raises ValueError where the fields do not fit."""
        if self.hidden_dim is not None and self.hidden_dim < 1:
            raise ValueError(f"{self.kind}.hidden_dim={self.hidden_dim} must be at least 1 (or None for 2 * embed_dim)")
        if self.conv_width < 0 or self.conv_width == 1:
            raise ValueError(f"{self.kind}.conv_width={self.conv_width} must be 0 (no convolution) or at least 2")

    def width(self, embed_dim: int) -> int:
        """C for this embed_dim."""
        return 2 * embed_dim if self.hidden_dim is None else self.hidden_dim

    def flops_per_token(self, embed_dim: int, seq_len: int) -> float:
        """Forward FLOPs a token: two per weight of the projections and the convolution."""
        return 2.0 * embed_dim * ((len(self.gates) + 2) * self.width(embed_dim) + self.conv_width)

    def initial_state(self, batch_size: int, embed_dim: int, dtype: Any, *, capacity: int = 0) -> MinRNNState:
        """h = 0 and no token before."""
        return MinRNNState(jnp.zeros((batch_size, self.width(embed_dim)), jnp.promote_types(dtype, jnp.float32)),
                           jnp.zeros((batch_size, max(0, self.conv_width - 1), embed_dim), dtype))

    @nn.compact
    def __call__(self, x: Array, state: MinRNNState, ctx: Context) -> tuple[Array, MinRNNState, Aux]:
        D, C, history = x.shape[-1], self.width(x.shape[-1]), state.shift
        if self.conv_width:
            x, history = CausalConv(self.conv_width, name="conv")(x, history, ctx)
        present = ctx.weights[..., None] != 0
        inputs = [Dense(C, ("embed", "mlp"), self.use_bias, name="candidate")(x)]
        for name, hold in self.gates.items():
            gate = Dense(C, ("embed", "mlp"), self.use_bias, name=name)(x)
            inputs.append(jnp.where(present, gate, jnp.asarray(hold, gate.dtype)))  # padding changes nothing
        rows = ("batch", "length", "mlp")

        def scan(run, h0: Array, reset: Array, *inputs: Array, **split: str) -> tuple[Array, Array]:
            return run(*inputs, h0, reset=reset, activation=self.hidden_act, implementation=self.implementation,
                       **split)

        hidden, last = over_shards(
            partial(scan, type(self).scan), partial(scan, type(self).scan_over_sequence),
            (state.hidden, ctx.reset, *inputs), (("batch", "mlp"), ("batch", "length"), *[rows] * len(inputs)),
            (rows, ("batch", "mlp")), (inputs[0].shape, state.hidden.shape))
        scale = 1.0 if self.output_scale is None else self.output_scale
        y = Dense(D, ("mlp", "embed"), self.use_bias, scale, name="out")(hidden.astype(x.dtype))
        return y, MinRNNState(last, history), {}


class MinGRU(MinRNN):
    """h_t = (1 - z_t) h_{t-1} + z_t g(W x_t), z_t = sigmoid(W_z x_t) (Feng et al. 2024, section 3.1).

    The fields are those of `MinRNN`.
    """

    kind = "min_gru"
    gates: ClassVar = {"update": -HOLD}
    scan = staticmethod(min_gru)
    scan_over_sequence = staticmethod(min_gru_over_sequence)


class MinLSTM(MinRNN):
    """h_t = f h_{t-1} + i g(W x_t) with forget and input gates that sum to one (Feng et al. 2024, section 3.2).

    The fields are those of `MinRNN`.
    """

    kind = "min_lstm"
    gates: ClassVar = {"forget": HOLD, "input": -HOLD}
    scan = staticmethod(min_lstm)
    scan_over_sequence = staticmethod(min_lstm_over_sequence)
