"""Which source gives the k-th row of a mixture, for any k without the rows before it."""

from collections.abc import Sequence

_TOTAL = 1 << 40


def proportions(rates: Sequence[float]) -> tuple[int, ...]:
    """Rates as integers that sum to about 2**40, none of them 0: row choice is then exact integer arithmetic."""
    return tuple(max(1, round(rate / sum(rates) * _TOTAL)) for rate in rates)


def choose(k: int, shares: Sequence[int]) -> tuple[int, int]:
    """(source, number of rows of that source before this one) for row k.

    The sources are interleaved evenly: among the first n rows, source i has had n * share_i / sum(shares) of them,
    give or take less than one for each source up to it in the list. The method is the one of `grain.MapDataset.mix`
    (first the rows of source 0, evenly spaced, then the others among the rest), which would round the shares to a
    hundredth of the smallest.
    """
    rest, before, after = sum(shares), k, k + 1
    for source, share in enumerate(shares[:-1]):
        left_before, left_after = before * (rest - share) // rest, after * (rest - share) // rest
        if left_before == left_after:
            return source, before - left_before
        rest, before, after = rest - share, left_before, left_after
    return len(shares) - 1, before
