"""Ends of chains: at which end does one arrive from a node, by following one link after the other?

Legend: n rows, C chains, L nodes of a chain, N = C L nodes, T = 2 N.
"""

import dataclasses

import numpy as np

from lm.core.fields import option
from lm.data.synthetic.base import Draw, Rows, one_example


@dataclasses.dataclass(frozen=True)
class ChainEnds:
    """C chains of L nodes as N links "node -> next" in random order, one link a position; the last node of a chain is
    its own next. Then every node is asked for, those far from their end first, and the answer is the end of its chain.
    Weight is on the questions.

    A node at distance d needs d hops, whatever is known of others: no question comes after one that is nearer. More
    hops than that do no harm, since an end leads to itself. With C ends to choose from, chance is 1 / C.

    Ids: the link from a to b is a N + b, the question about a, and the answer a, is N^2 + a.
    """

    num_chains: int = option(2, "chains of a row")
    length: int = option(6, "nodes of each chain; each distance from 0 to length - 1 is evaluated as set hops_<d>")

    def check(self) -> None:
        """Raises ValueError for sizes below 1."""
        if self.num_chains < 1 or self.length < 1:
            raise ValueError(f"chain_ends: num_chains={self.num_chains} and length={self.length} must be at least 1")

    @property
    def nodes(self) -> int:
        """N."""
        return self.num_chains * self.length

    @property
    def vocab_size(self) -> int:
        return self.nodes**2 + self.nodes

    def check_length(self, seq_len: int) -> None:
        """Raises ValueError where links and questions do not fit."""
        if seq_len < 2 * self.nodes:
            raise ValueError(f"chain_ends with {self.num_chains} chains of {self.length} needs train.seq_len of at "
                             f"least {2 * self.nodes}, a link and a question for each node; got {seq_len}")

    def rows(self, draw: Draw, seq_len: int) -> Rows:
        """N links, N questions, padding."""
        C, L, N = self.num_chains, self.length, self.nodes
        node = draw.distinct("nodes", N, N)  # [n, N], chain after chain, each from its start to its end
        n = len(node)
        chains = node.reshape(n, C, L)
        following = np.concatenate([chains[:, :, 1:], chains[:, :, -1:]], axis=2).reshape(n, N)
        order = draw.distinct("links", N, N)
        links = np.take_along_axis(node * N + following, order, axis=1)
        # At each distance the chains come in an order of their own.
        turn = np.stack([draw.distinct(f"turn {d}", C, C) for d in range(L)], axis=1)  # [n, L, C]
        asked = np.take_along_axis(chains.transpose(0, 2, 1), turn, axis=2).reshape(n, N)
        ends = np.take_along_axis(np.repeat(chains[:, None, :, -1], L, axis=1), turn, axis=2).reshape(n, N)
        tail = np.zeros((n, seq_len - 2 * N), np.int64)
        tokens = np.concatenate([links, N * N + asked, tail], axis=1)
        targets = np.concatenate([np.zeros_like(links), N * N + ends, tail], axis=1)
        made = one_example(tokens, targets, np.broadcast_to(self._questions(seq_len), tokens.shape))
        return made._replace(positions=np.where(np.arange(seq_len) < 2 * N, made.positions, -1))

    def _questions(self, seq_len: int) -> np.ndarray:
        place = np.arange(seq_len)
        return (place >= self.nodes) & (place < 2 * self.nodes)

    def slices(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """`hops_<d>` of each distance d from the end."""
        first = lambda d: self.nodes + (self.length - 1 - d) * self.num_chains
        return {f"hops_{d}": (positions >= first(d)) & (positions < first(d) + self.num_chains)
                for d in range(self.length)}
