"""TransformerFAM's attention and its feedback memory (Hwang et al. 2024, arXiv:2404.09173): fields, projections, state.

The memory passes through the block's channel mixer, so the layer does nothing alone: `fam_block` runs it.

Shape legend: B batch, T time, f slots of the memory, S ring slots, H heads, G key-value heads, K head_dim, D embed_dim.
"""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from lm.core.types import Array
from lm.layers.bswa import heads_from, output
from lm.layers.segments import Cut, Ring, check_fields, heads_of, keys_seen

UNPLACED = -(2**30)  # position of a memory from another text: just before the first token, wherever that stands


class FAMState(NamedTuple):
    """A `Ring` of the last tokens, and the feedback memory after the last whole block.

    memory: [B, f, D] float32. memory_keys, memory_values: [B, f, G, K], what tokens see of it. memory_document,
    memory_end: [B] number of the document that it is of, -1 before the first, and the position of its last slot.
    """

    keys: Array
    values: Array
    order: Array
    documents: Array
    length: Array
    document: Array
    start: Array
    memory: Array
    memory_keys: Array
    memory_values: Array
    memory_document: Array
    memory_end: Array

    @property
    def ring(self) -> Ring:
        """The tokens alone."""
        return Ring(*self[:len(Ring._fields)])

    def passed(self) -> tuple[Array, Array]:
        """(memory [..., f, D] of the first row, whether there is one), to begin other rows with."""
        return self.memory[..., 0, :, :], self.memory_document[..., 0] >= 0

    def begun(self, memory: Array, use: Array) -> "FAMState":
        """This state of no tokens, as the first document of every row finds it: after another text's memory [..., f, D]
        where `use` (bool [...])."""
        wide = lambda a, like: a.reshape(*a.shape, *[1] * (like.ndim - a.ndim))
        rows = jnp.broadcast_to(memory[..., None, :, :], self.memory.shape)
        # Documents are counted from 1: that of the row's first token.
        document = jnp.where(wide(use, self.memory_document), 1, self.memory_document)
        return self._replace(memory=jnp.where(wide(use, rows), rows, self.memory), memory_document=document,
                             memory_end=jnp.where(wide(use, document), UNPLACED, self.memory_end))


class FAM(nn.Module):
    """Block sliding-window attention with `slots` of feedback memory. A block of this kind is written 'fam/mlp'.

    At the end of a block of tokens the memory attends to itself and to the block, passes through the block's channel
    mixer, and is what the tokens of the next block see besides their memory segments. The first update of a document
    adds to zero, not to the learned start. In the first block of a document tokens see the learned start in the first
    layer of this kind, and none above it: what has flowed up there has read the whole block.

    num_heads, num_kv_heads, head_dim, rope_theta, qk_norm, use_bias, dropout, output_scale: as of `attention`.
    block, memory, cut, stop_gradient, same_reach: as of `bswa`.
    slots: vectors of feedback memory a layer; 0 is `bswa`.
    slot_position: where the memory stands for rotary positions: over the last positions of the block that it was made
      of, or always at 0.
    implementation: cudnn or xla; None is the best for the platform, logged once.
    """

    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = 10_000.0
    qk_norm: bool = False
    use_bias: bool = False
    dropout: float = 0.0
    output_scale: float | None = None
    block: int = 1024
    memory: int = 3
    slots: int = 64
    slot_position: Literal["last", "zero"] = "last"
    cut: Cut = "document"
    stop_gradient: bool = False
    same_reach: bool = False
    implementation: str | None = None

    def check(self, embed_dim: int) -> None:
        """Raises ValueError where the fields do not fit together or the width."""
        check_fields(self, "fam", embed_dim)
        if self.slots < 0:
            raise ValueError(f"fam.slots={self.slots} must be at least 0, which is block sliding-window attention")

    def check_mesh(self, mesh: Any) -> None:
        """Raises ValueError for a mesh that splits the sequence."""
        if mesh.get("context", 1) > 1 and self.slots:
            raise ValueError(f"fam cannot split the sequence over devices (mesh.context={mesh['context']}): its memory "
                             f"of a block needs that of the block before, so all devices but one would wait. Use "
                             f"mesh.fsdp and mesh.data, or `bswa`, which splits")

    def flops_per_token(self, embed_dim: int, seq_len: int) -> float:
        """Forward FLOPs a token: those of `bswa`, its look at the memory, and its share of the memory's own
        attention."""
        heads, groups, dim = heads_of(self, embed_dim)
        share = self.slots / self.block
        projections = 4.0 * embed_dim * dim * (heads + groups)
        seen = keys_seen(self.block, self.memory, seq_len) + self.slots + share * (self.slots + self.block)
        return (1 + share) * projections + 4.0 * heads * dim * seen

    def initial_state(self, batch_size: int, embed_dim: int, dtype: Any, *, capacity: int = 0) -> FAMState:
        """A ring of memory + 1 blocks, or of `capacity` slots where that is fewer, and no memory yet."""
        _, groups, dim = heads_of(self, embed_dim)
        ring = Ring.empty(batch_size, min(capacity, (self.memory + 1) * self.block), groups, dim, dtype)
        seen = jnp.zeros((batch_size, self.slots, groups, dim), jnp.float32)
        number = jnp.full((batch_size,), -1, jnp.int32)
        return FAMState(*ring, jnp.zeros((batch_size, self.slots, embed_dim), jnp.float32), seen, seen, number, number)

    @nn.compact
    def __call__(self, x: Array, positions: Array | None = None, embed_dim: int | None = None) -> Any:
        """(q, k, v) of x [B, T, D] at positions [B, T]; with embed_dim, the output projection of x [B, T, H, K]."""
        return heads_from(self, x, positions) if embed_dim is None else output(self, x, embed_dim)
