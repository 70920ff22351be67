"""How a message names the places that pairs come from: the first few, and how many there are."""

from collections.abc import Sequence

SHOWN = 5  # places that a message names


def first_of(places: Sequence[str]) -> str:
    """The first SHOWN places, and how many others."""
    others = len(places) - SHOWN
    return ", ".join(places[:SHOWN]) + (f" and {others} other{'s' if others > 1 else ''}" if others > 0 else "")
