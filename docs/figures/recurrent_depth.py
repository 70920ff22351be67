"""Draws docs/figures/recurrent_depth.svg: `python docs/figures/recurrent_depth.py [--check]`."""

import pathlib
import sys
from xml.sax.saxutils import escape

PATH = pathlib.Path(__file__).with_suffix(".svg")

BOX, HEIGHT, GAP, LEFT, TOP = 104, 58, 34, 24, 150
# Title, second line, fill: what a token passes from left to right.
SILENT, HEARD, ONCE = "#eeeeee", "#f3f8ee", "#eef4fb"
BOXES = [("s_0", "random", "#ffffff"), ("core", "iteration 1", SILENT), ("core", "iteration r - k", SILENT),
         ("core", "iteration", HEARD), ("core", "iteration r", HEARD), ("norm, coda", "norm, head", ONCE)]
WIDTH, TALL = 2 * LEFT + len(BOXES) * BOX + (len(BOXES) - 1) * GAP, 292


def text(x: float, y: float, words: str, size: int = 12, style: str = 'fill="#333"', anchor: str = "middle") -> str:
    """One line of text."""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" {style}>{escape(words)}</text>'


def line(*points: tuple[float, float], head: bool = True, dashed: bool = False) -> str:
    """A line through the points, with a head at its end where wanted."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return (f'<polyline points="{path}" fill="none" stroke="#444" stroke-width="1.5"'
            f'{" stroke-dasharray=" + chr(34) + "5 4" + chr(34) if dashed else ""}'
            f'{" marker-end=" + chr(34) + "url(#head)" + chr(34) if head else ""}/>')


def box(x: float, y: float, title: str, below: str, fill: str) -> list[str]:
    """A box with two lines."""
    return [f'<rect x="{x}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="5" fill="{fill}" stroke="#888"/>',
            text(x + BOX / 2, y + 25, title, 14, 'fill="#111" font-weight="bold"'), text(x + BOX / 2, y + 44, below)]


def draw() -> str:
    """The whole figure as SVG."""
    at = lambda n: LEFT + n * (BOX + GAP)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {TALL}" width="{WIDTH}" height="{TALL}" '
           'font-family="Helvetica, Arial, sans-serif">',
           "<title>A token through a model of recurrent depth: prelude, r iterations of the core, coda</title>",
           '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
           'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#444"/></marker></defs>',
           f'<rect width="{WIDTH}" height="{TALL}" fill="#ffffff"/>']
    middle = TOP + HEIGHT / 2
    for n, (title, below, fill) in enumerate(BOXES):
        out += box(at(n), TOP, title, below, fill)
        if n:
            out.append(line((at(n) - GAP, middle), (at(n), middle), dashed=n in (2, 4)))
    top = 24
    out += box(at(0), top, "embedding", "x sqrt(D)", ONCE) + box(at(1), top, "prelude", "once", ONCE)
    y, bus = top + HEIGHT / 2, 108
    out.append(line((at(1) - GAP, y), (at(1), y)))
    out.append(line((at(1) + BOX, y), (at(2) - GAP / 2, y), (at(2) - GAP / 2, bus), head=False))
    out.append(line((at(1) + BOX / 2, bus), (at(4) + BOX / 2, bus), head=False))
    out.append(text(at(2) + 4, y + 4, "e, which every iteration sees: s' = blocks(adapter [s; e])", anchor="start"))
    out += [line((at(n) + BOX / 2, bus), (at(n) + BOX / 2, TOP)) for n in (1, 2, 3, 4)]
    low = TOP + HEIGHT + 22
    for first, last, words in ((1, 2, "a loop of r - k iterations, no gradient"),
                               (3, 4, "a scan of k iterations with gradient")):
        out.append(line((at(first), low), (at(last) + BOX, low), head=False))
        out.append(text((at(first) + at(last) + BOX) / 2, low + 18, words))
    words = "r is drawn at each step of training, and at will, or by token, afterwards"
    out.append(text(WIDTH / 2, low + 48, words, 13))
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PATH.read_text() == draw() else f"{PATH.name} is out of date: run python {sys.argv[0]}")
    PATH.write_text(draw())
