"""Draws docs/figures/fam_pattern.svg, who sees whom in `fam`: `python docs/figures/fam_pattern.py [--check]`."""

import pathlib
import sys

PATH = pathlib.Path(__file__).with_suffix(".svg")
BLOCK, MEMORY, SLOTS, BLOCKS, CELL, LEFT, TOP = 4, 1, 2, 4, 15, 130, 64
COLORS = {"own block": "#3b6ea5", "memory segment": "#9fc0e0", "feedback memory": "#e08a3c"}


def columns() -> list[tuple[str, int, int]]:
    """(kind, block, place) of keys in the order of the text: a block's tokens, then the memory made of it."""
    return [(kind, block, place) for block in range(BLOCKS) for kind, count in (("token", BLOCK), ("slot", SLOTS))
            for place in range(count)]


def color(row: tuple[str, int, int], column: tuple[str, int, int]) -> str | None:
    """What the row's query sees in the column's key."""
    (kind, block, place), (of, at, where) = row, column
    if of == "slot":
        return COLORS["feedback memory"] if at == block - 1 else None
    if kind == "slot":
        return COLORS["own block"] if at == block else None
    if at == block:
        return COLORS["own block"] if where <= place else None
    return COLORS["memory segment"] if block - MEMORY <= at < block else None


def draw() -> str:
    """The figure."""
    keys = columns()
    size = len(keys) * CELL
    width, height = LEFT + size + 20, TOP + size + 48
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
           'font-family="sans-serif" font-size="12" fill="#222">',
           f'<rect width="{width}" height="{height}" fill="#fff"/>',
           f'<text x="{LEFT}" y="20" font-size="14">keys, block by block: tokens, and the memory made of them</text>']
    for n, row in enumerate(keys):
        for m, column in enumerate(keys):
            fill = color(row, column) or "#f4f4f4"
            out.append(f'<rect x="{LEFT + m * CELL}" y="{TOP + n * CELL}" width="{CELL - 1}" height="{CELL - 1}" '
                       f'fill="{fill}"/>')
    step = BLOCK + SLOTS
    for block in range(BLOCKS):
        start = block * step * CELL
        out += [f'<text x="{LEFT + start}" y="{TOP - 8}">block {block + 1}</text>',
                f'<text x="{LEFT + start + BLOCK * CELL}" y="{TOP - 8}">F{block + 1}</text>',
                f'<text x="{LEFT - 8}" y="{TOP + start + 34}" text-anchor="end">tokens of block {block + 1}</text>',
                f'<text x="{LEFT - 8}" y="{TOP + start + BLOCK * CELL + 20}" text-anchor="end">update F{block + 1}'
                '</text>']
    for n, (name, fill) in enumerate(COLORS.items()):
        x = LEFT + 125 * n
        out += [f'<rect x="{x}" y="{height - 28}" width="13" height="13" fill="{fill}"/>',
                f'<text x="{x + 19}" y="{height - 17}">{name}</text>']
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PATH.read_text() == draw() else f"{PATH.name} is old; run {pathlib.Path(__file__).name}")
    PATH.write_text(draw())
