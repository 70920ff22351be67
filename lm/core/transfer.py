"""How sizes differ from a base size, so that the learning rate that is best there stays best: muP over width (Yang and
Hu 2022, arXiv:2203.03466, table 8, Adam) and CompleteP or depth-muP over depth (Dey et al. 2025, arXiv:2505.01618;
Yang et al. 2023, arXiv:2310.02244). n is width over base width, l depth over base depth; at the base size nothing
changes.

| | standard | here | where |
|---|---|---|---|
| hidden matrix, deviation at the start | 1 / sqrt(fan in) | the same | |
| hidden matrix, learning rate | 1 | 1 / n | optimizer |
| embedding, biases, norms: both | 1 | 1 | |
| head, deviation at the start | 1 / sqrt(width) | 1 / sqrt(base width) | model |
| head, learning rate | 1 | 1 | |
| logits (head or tied embedding) | 1 | 1 / n | model |
| sum of a residual branch | 1 | l^-a | model |
| branch outputs, deviation at the start | 1 / sqrt(2 depth) | 1 / sqrt(2 base depth) | model |
| all in the blocks, learning rate | 1 | l^(a - 1) | optimizer |

a = 1 is CompleteP, whose learning rates do not depend on depth, and a = 1/2 is depth-muP. Attention scores stay at
1 / sqrt(head_dim) because heads keep their size and their number grows; table 8's 1 / head_dim is for heads that grow.
"""

from typing import NamedTuple


class Transfer(NamedTuple):
    """A size and its base. base_width, base_depth: None for no transfer over it. exponent: a."""

    width: int
    base_width: int | None
    depth: int
    base_depth: int | None
    exponent: float

    @property
    def n(self) -> float:
        """Width over base width."""
        return self.width / (self.base_width or self.width)

    @property
    def deep(self) -> float:
        """Depth over base depth: l."""
        return self.depth / (self.base_depth or self.depth)

    @property
    def logits(self) -> float:
        """What logits are multiplied by."""
        return 1.0 / self.n

    @property
    def head_scale(self) -> float:
        """The head's deviation at the start over 1 / sqrt(width)."""
        return self.n**0.5

    @property
    def branch(self) -> float:
        """What a residual branch is multiplied by."""
        return self.deep**-self.exponent

    @property
    def deep_rate(self) -> float:
        """What learning rates in the blocks are multiplied by."""
        return self.deep ** (self.exponent - 1)
