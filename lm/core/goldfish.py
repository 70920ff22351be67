"""Goldfish masks: which targets of a training batch the loss does not see (Hans et al. 2024, "Be like a goldfish").

A mask is a pure function of the ids, so that what is dropped once is dropped at every repetition. The same code runs on
numpy arrays in the data pipeline and on JAX arrays inside the train step, with the same result to the bit; this file
imports neither a device nor a random generator.

Shapes: B batch rows, T time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from lm.core.batch import Batch, MaskedBatch
from lm.core.fields import option
from lm.core.goldfish_hash import lanes_of_salt, random_bits, shift, threshold, window_bits
from lm.core.goldfish_umd import drop_table, product_keys


@dataclasses.dataclass(frozen=True)
class Goldfish:
    """Takes about one in k targets out of the training loss, chosen by a hash of their last h tokens: a text that is
    repeated is never learned whole. It acts on weights, so every loss and every model can have it; evaluation never
    sees it."""

    mask: Literal["hash", "static", "random"] = option(
        "hash", "hash drops a target by the h tokens that end with it; static every k-th of a document; random afresh "
                "at every repetition, which protects nothing and is there to compare with")
    k: int = option(4, "one in k targets is dropped; the larger, the more is memorised")
    h: int = option(13, "tokens that decide, the target among them; the first h - 2 targets of a document have fewer "
                        "before them and are always kept")
    offset: int = option(0, "static: position in the document of the first target that is dropped, below k")
    salt: int = option(0, "another number drops other targets; keep it over all runs on the same texts")
    exempt: tuple[int, ...] | None = option(None, "ids that are never dropped; None is the tokenizer's special ids")
    compat: Literal["umd"] | None = option(None, "'umd' drops exactly what the authors' CPU code drops (product hash "
                                           "and its table; windows cross documents, no id is exempt); None is the hash "
                                           "of this project, which sees the order of the tokens")
    where: Literal["device", "data"] = option("device", "the train step makes the mask, or the data pipeline does; the "
                                              "result is the same")

    def check(self, where: str = "config.loss.goldfish") -> None:
        """Raises ValueError for values that make no mask."""
        for name, value, least in (("k", self.k, 2), ("h", self.h, 1)):
            if not least <= value < 2**31:
                raise ValueError(f"{where}.{name}={value} must be from {least} to 2^31 - 1"
                                 + ("; leave goldfish out to drop nothing" if name == "k" else ""))
        if not 0 <= self.offset < self.k or (self.offset and self.mask != "static"):
            raise ValueError(f"{where}.offset={self.offset} must be from 0 to k - 1 = {self.k - 1}, and 0 where mask "
                             f"is not 'static'")
        if not 0 <= self.salt < 2**32:
            raise ValueError(f"{where}.salt={self.salt} must be from 0 to 2^32 - 1")
        if (below := [i for i in self.exempt or () if i < 0]):
            raise ValueError(f"{where}.exempt holds {below[0]}, and ids are 0 and above; None stands for the "
                             f"tokenizer's special ids")
        if self.compat and (self.mask == "random" or self.salt or self.exempt):
            raise ValueError(f"{where}.compat={self.compat!r} is the published mask, hash or static, which has no salt "
                             f"and exempts no id; leave those out, or compat")

    def check_length(self, seq_len: int, where: str = "config.loss.goldfish") -> None:
        """Raises ValueError where no target of a row of seq_len has enough tokens before it to be dropped."""
        needed = self.h if self.compat else self.h - 1
        if self.mask == "hash" and needed > seq_len:
            raise ValueError(f"{where}.h={self.h} needs train.seq_len of at least {needed}, and it is {seq_len}: no "
                             f"target would ever be dropped; lower h")

    def check_vocab(self, vocab_size: int, where: str = "config.loss.goldfish") -> None:
        """Raises ValueError for an exempt id that the tokenizer does not have."""
        if (beyond := [i for i in self.exempt or () if i >= vocab_size]):
            raise ValueError(f"{where}.exempt holds {beyond[0]}, and the tokenizer's ids are 0 to {vocab_size - 1}")

    def with_exempt(self, special: Sequence[int]) -> "Goldfish":
        """The same, with the ids that are exempt written out; `special` are the tokenizer's."""
        if self.compat or self.exempt is not None:
            return self
        return dataclasses.replace(self, exempt=tuple(int(i) for i in special))

    @property
    def repeats(self) -> bool:
        """Whether a text loses the same targets whenever it comes."""
        return self.mask != "random"


def dropped(options: Goldfish, batch: Batch, first_row: Any = 0, place: Any = None) -> Any:
    """[B, T] bool: the targets that the mask takes out.

    batch: numpy or JAX arrays; weights are not looked at. first_row: number of the batch's first row in the run, uint32
    (only `random` depends on it). place: [1, T] uint32, which positions of a row these are; None is from 0. The result
    is undefined where there is no target.
    """
    xp = batch.targets.__array_namespace__()
    place = xp.arange(batch.targets.shape[1], dtype=xp.uint32)[None, :] if place is None else place
    if options.mask == "static":
        index = place if options.compat else batch.positions.astype(xp.uint32)
        out = (index >= np.uint32(options.offset)) & ((index - np.uint32(options.offset)) % np.uint32(options.k) == 0)
        out = xp.broadcast_to(out, batch.targets.shape)
    elif options.mask == "random":
        rows = xp.arange(batch.targets.shape[0], dtype=xp.uint32)[:, None] + xp.asarray(first_row, dtype=xp.uint32)
        out = random_bits(rows, place, lanes_of_salt(options.salt)) < threshold(options.k)
    elif options.compat:
        keys = product_keys(batch.tokens, batch.targets, options.h)
        out = xp.asarray(drop_table(options.k))[keys.astype(xp.int32)] & (place >= np.uint32(options.h - 1))
    else:
        bits = window_bits(batch.tokens, batch.targets, options.h, lanes_of_salt(options.salt))
        out = (bits < threshold(options.k)) & whole_windows(batch.segment_ids, options.h)
    if options.exempt and not options.compat:
        table = np.zeros(max(options.exempt) + 2, bool)  # the last entry stands for all ids beyond
        table[list(options.exempt)] = True
        out = out & ~xp.asarray(table)[xp.clip(batch.targets, 0, len(table) - 1)]
    return out


def whole_windows(segment_ids: Any, h: int) -> Any:
    """[B, T] bool: the h - 1 tokens up to here are of one document."""
    if h <= 2:
        return segment_ids.__array_namespace__().ones_like(segment_ids, dtype=bool)
    return shift(segment_ids, h - 2) == segment_ids


def masked(options: Goldfish, batch: Batch, first_row: Any = 0, find: Callable[..., Any] = dropped) -> MaskedBatch:
    """The batch with weight 0 at dropped targets, and the weight that they had in `dropped`."""
    drop = find(options, batch, first_row)
    xp = batch.targets.__array_namespace__()
    zero = xp.zeros((), batch.weights.dtype)
    return MaskedBatch(batch.tokens, batch.targets, xp.where(drop, zero, batch.weights), batch.segment_ids,
                       batch.positions, xp.where(drop, batch.weights, zero))
