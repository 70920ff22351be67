"""Selective copying: which tokens to keep is decided by what they are, not by where they stand (Gu and Dao 2023, 3.1).

Legend: n rows, T seq_len.
"""

import dataclasses

import numpy as np

from lm.core.fields import option
from lm.data.synthetic.base import Draw, Rows, one_example

NOISE, GO, FIRST_SYMBOL = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class SelectiveCopy:
    """`num_tokens` symbols stand at random places among noise; then as many marks ask for them in order.

    Id 0 is noise, 1 the mark, the symbols follow. Weight is on the marks alone.
    """

    num_tokens: int = option(4, "symbols to remember, and marks at the end of the row")
    num_symbols: int = option(8, "different symbols")

    def check(self) -> None:
        """Raises ValueError for sizes below 1."""
        if self.num_tokens < 1 or self.num_symbols < 1:
            raise ValueError(f"selective_copy: num_tokens={self.num_tokens} and num_symbols={self.num_symbols} must be "
                             f"at least 1")

    @property
    def vocab_size(self) -> int:
        return FIRST_SYMBOL + self.num_symbols

    def check_length(self, seq_len: int) -> None:
        """Raises ValueError where symbols and marks do not fit."""
        if seq_len < 2 * self.num_tokens:
            raise ValueError(f"selective_copy with num_tokens={self.num_tokens} needs train.seq_len of at least "
                             f"{2 * self.num_tokens}; got {seq_len}")

    def rows(self, draw: Draw, seq_len: int) -> Rows:
        """seq_len - num_tokens places of noise and symbols, then the marks."""
        context = seq_len - self.num_tokens
        symbols = FIRST_SYMBOL + draw.integers("symbols", self.num_tokens, self.num_symbols)
        places = np.sort(draw.distinct("places", self.num_tokens, context), axis=1)
        tokens = np.full((len(symbols), seq_len), NOISE)
        np.put_along_axis(tokens, places, symbols, axis=1)
        tokens[:, context:] = GO
        targets = np.zeros_like(tokens)
        targets[:, context:] = symbols
        return one_example(tokens, targets, tokens == GO)

    def slices(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """None."""
        return {}
