"""The first pass of the bfloat16 kernels of wkv6 and wkv7: factors of a chunk's decays, for the passes after it."""

from pallas_kernels.wkv6.pair_loop import F32, Kept, Reading
from pallas_kernels.wkv6.pair_scores import Factors, Totals, fill_factors

DECAYS = dict(factors=Kept(Factors.shape, F32), totals=Kept(Totals.shape, F32), decay=Kept((8, 128), F32),
              turned=Kept((64, 128), F32, on=False))


def decays(names: tuple[str, ...], block: Reading, chunk) -> None:
    """A pass that fills `DECAYS` of all pairs: named factors, and the decay over the whole chunk. What reads them is
    another pass: in this one the compiler would keep them in registers, more than there are."""
    memory = block.memory
    for pair in block.pairs:
        factors, totals = kept_decays(names, block, chunk, pair)
        fill_factors(block.read("w", chunk, pair), block.starts_across(chunk), factors, totals,
                     memory["turned"].at(chunk, pair), memory["turned"].later(chunk, pair))
        memory["decay"][chunk, pair] = totals[12] * totals[13]


def kept_decays(names: tuple[str, ...], block: Reading, chunk, pair: int) -> tuple[Factors, Totals]:
    """What that pass keeps of the positions, and of eighths."""
    memory = block.memory
    return Factors(names, memory["factors"].at(chunk, pair)), Totals(memory["totals"].at(chunk, pair))
