"""The decoder language model: embed, stack, norm, head.

Shape legend: B batch, T time, D embed_dim, V padded vocabulary, L layers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.core.sharding import constrain
from lm.core.transfer import Transfer
from lm.core.types import Array, Aux, Context, Head, Key, Output, State
from lm.layers.block import Block
from lm.layers.dropout import dropout
from lm.layers.fam_block import ONWARD, memory_shape
from lm.layers.linear import Embed, OutputHead, with_adapter
from lm.layers.stack import Stack


class DecoderState(NamedTuple):
    """positions: [B] int32, position of the next token in its document; stack: states of the layers."""

    positions: Array
    stack: State


class DecoderLM(nn.Module):
    """Next-token model over `vocab_size` ids.

    vocab_multiple: the tables are padded to a multiple of this, the same on every mesh, so that the vocabulary can be
      split over `tensor` and a checkpoint fits any mesh. Padding ids get logits of minus infinity.
    tie_embeddings: the embedding is the head. max_positions: rows of a learned table of absolute positions; None for
      none (rotary positions are the attention layer's own). softcap: logits become softcap * tanh(logits / softcap).
    dtype: of activations; parameters are float32. embed_norm: norm of the embedded input, None for none.
    random_positions: in training, half of the rows start at a random position below this; None starts all at 0.
    transfer: the base size whose learning rates hold here (muP), None for none; blocks have their part of it.
    """

    vocab_size: int
    embed_dim: int
    stack: Stack
    final_norm: nn.Module
    vocab_multiple: int = 128
    tie_embeddings: bool = True
    max_positions: int | None = None
    embed_std: float = 0.02
    softcap: float | None = None
    dropout: float = 0.0
    dtype: str = "bfloat16"
    embed_norm: nn.Module | None = None
    random_positions: int | None = None
    transfer: Transfer | None = None

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding and head tables."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def initial_state(self, batch_size: int, *, capacity: int = 0) -> DecoderState:
        """State before the first token, with room for `capacity` tokens (0: the state will not be used to go on)."""
        return DecoderState(jnp.zeros((batch_size,), jnp.int32),
                            self.stack.initial_state(batch_size, self.embed_dim, jnp.dtype(self.dtype),
                                                     capacity=capacity))

    def check_length(self, num_tokens: int) -> None:
        """Raises ValueError for more tokens than a table of learned positions has rows."""
        if self.max_positions is not None and num_tokens > self.max_positions:
            raise ValueError(f"{num_tokens} tokens do not fit the {self.max_positions} learned positions of this model "
                             f"(model.max_positions); ask for fewer tokens, or train with rotary positions")

    def flops_per_token(self, seq_len: int) -> float:
        """Forward FLOPs a token in rows of seq_len: every matrix product, the head included; lookups are free."""
        return self.stack.flops_per_token(self.embed_dim, seq_len) + 2.0 * self.embed_dim * self.padded_vocab

    def passes(self, seq_len: int, backward: float = 2.0) -> float:
        """What a training step costs in forward passes, where the backward pass of what it goes through costs so many:
        2, or 1 where kernels are frozen."""
        return 1.0 + backward

    @nn.compact
    def __call__(self, tokens: Array, state: DecoderState | None = None, *, reset: Array | None = None,
                 positions: Array | None = None, weights: Array | None = None, key: Key | None = None) -> Output:
        B, T = tokens.shape
        if state is None:
            state = self.initial_state(B)
            fresh = jnp.zeros((B, T), bool).at[:, 0].set(True)
            reset = fresh if reset is None else reset | fresh
        reset = jnp.zeros((B, T), bool) if reset is None else reset
        weights = jnp.ones((B, T), bool) if weights is None else weights
        if "state" in self.variables:  # learned, it stands in for the given one wherever no token was seen
            reset = reset.at[:, 0].set(reset[:, 0] | (state.positions == 0))
        if positions is None:
            positions = positions_after(state.positions, reset, weights)
        last = jnp.sum(weights != 0, axis=1, dtype=jnp.int32)
        following = jnp.take_along_axis(positions, jnp.maximum(last - 1, 0)[:, None], axis=1)[:, 0] + 1
        following = jnp.where(last > 0, following, state.positions)

        dtype = jnp.dtype(self.dtype)
        x, table = Embed(self.padded_vocab, self.embed_dim, self.embed_std, name="embed")(tokens, dtype)
        if self.max_positions is not None:
            where = Embed(self.max_positions, self.embed_dim, self.embed_std, (None, "embed"), name="position")
            x = x + where(positions, dtype)[0]
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        x = constrain(dropout(x, self.dropout, key, salt=1), "batch", "length", "activation_embed")
        ctx = Context(reset, moved(positions, self.random_positions, key), weights, key, self._onward(B, T))
        scale = 1.0 if self.transfer is None else self.transfer.head_scale
        kernel = table if self.tie_embeddings else OutputHead(self.padded_vocab, scale, name="head")(self.embed_dim)
        head = Head(kernel, None, self.vocab_size, self.softcap)

        def adapted(x: Array) -> tuple[Array, Head]:
            if self.transfer is not None:
                x = x * jnp.asarray(self.transfer.logits, x.dtype)
            if self.tie_embeddings or "head" not in self.variables.get("lora", {}):
                return x, head
            adapter = self.variables["lora"]["head"]
            return with_adapter(x, head, adapter["a"], adapter["b"], adapter.get("magnitude"))

        x, after, aux = self.layers(x, state.stack, ctx, adapted)
        return Output(*adapted(x), DecoderState(following, after), aux)

    def layers(self, x: Array, state: State, ctx: Context,
               head: Callable[[Array], tuple[Array, Head]]) -> tuple[Array, State, Aux]:
        """From the embedded input to normed hidden states. head: hidden states with the head that reads them."""
        x, after, aux = self.stack(x, state, ctx)
        if "tally" in aux:  # named like the variables
            aux = {**aux, "tally": {"stack": aux["tally"]}}
        return self.final_norm(x), after, aux

    def _onward(self, batch_size: int, num_tokens: int) -> Aux:
        """What flows up beside the activations: the learned start of the feedback memory, where blocks have one."""
        shape = memory_shape([block for _, block, *_ in self.blocks()], num_tokens)
        if shape is None:
            return {}
        chunks, slots = shape
        start, _ = Embed(slots, self.embed_dim, self.embed_std, (None, "embed"), name="memory")(
            jnp.arange(slots), jnp.float32)
        return {ONWARD: {"memory": jnp.broadcast_to(start, (batch_size, chunks, slots, self.embed_dim)),
                         "learned": jnp.ones((), bool)}}

    def blocks(self) -> list[tuple[str, Block, int, float]]:
        """(name of its variables, block, how often it stands there, how often each is run) in order of depth."""
        return [(f"stack/prefix_{n}", block, 1, 1.0) for n, block in enumerate(self.stack.prefix)] \
            + [(f"stack/pattern_{n}", block, self.stack.repeats, 1.0) for n, block in enumerate(self.stack.pattern)]


def moved(positions: Array, below: int | None, key: Key | None) -> Array:
    """Positions [B, T] with one offset a row: in training, half of the rows start at a random place from 0 to below - 1
    (Hwang et al. 2024, random position offset)."""
    if below is None or key is None:
        return positions
    which, place = jax.random.split(jax.random.fold_in(key, 2**31 - 1))
    shape = (positions.shape[0], 1)
    return positions + jax.random.bernoulli(which, 0.5, shape) * jax.random.randint(place, shape, 0, below)


def positions_after(start: Array, reset: Array, weights: Array) -> Array:
    """Position of each token in its document: counts on from `start` [B], from 0 at each reset, over real tokens.

    reset, weights: [B, T]. Returns [B, T] int32.
    """
    present = (weights != 0).astype(jnp.int32)
    count = jnp.cumsum(present, axis=1) - present  # real tokens before this one in the call
    began = jax.lax.cummax(jnp.where(reset, count, -1), axis=1)
    return jnp.where(began < 0, start[:, None] + count, count - began)
