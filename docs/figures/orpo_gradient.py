"""Draws docs/figures/orpo_gradient.svg, how large ORPO's gradient is: `python docs/figures/orpo_gradient.py`."""

import math
import pathlib
import sys

PATH = pathlib.Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT, LEFT, TOP, SIDE = 900, 400, 70, 50, 280
COLORS = ("#30638e", "#d1495b", "#2e8b57")
OTHERS = (0.05, 0.3, 0.9)  # the probability that is held fixed, a curve each
LOW, HIGH = -3, 3  # decades of the gradient shown


def chosen(p: float, q: float) -> float:
    """-d loss / d log P_w: how hard the chosen response is pushed up."""
    return q / (p + q - 2 * p * q)


def rejected(p: float, q: float) -> float:
    """d loss / d log P_l: how hard the rejected one is pushed down."""
    return q * (1 - p) / ((1 - q) * (p + q - 2 * p * q))


def panel(left: int, title: str, label: str, fixed: str, value) -> list[str]:
    """One set of axes: probability from 0 to 1 below, size of the gradient in decades beside."""
    x = lambda p: left + SIDE * p
    y = lambda v: TOP + SIDE * (1 - (math.log10(min(max(v, 10**LOW), 10**HIGH)) - LOW) / (HIGH - LOW))
    out = [f'<text x="{left + SIDE / 2:.0f}" y="{TOP - 18}" text-anchor="middle" font-weight="bold">{title}</text>',
           f'<rect x="{left}" y="{TOP}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#999999"/>']
    for decade in range(LOW, HIGH + 1):
        out.append(f'<line x1="{left}" x2="{left + SIDE}" y1="{y(10**decade):.1f}" y2="{y(10**decade):.1f}" '
                   f'stroke="#e3e3e3"/><text x="{left - 8}" y="{y(10**decade) + 4:.1f}" text-anchor="end">'
                   f'{10.0**decade:g}</text>')
    for tick in (0, 0.25, 0.5, 0.75, 1):
        out.append(f'<text x="{x(tick):.1f}" y="{TOP + SIDE + 18}" text-anchor="middle">{tick:g}</text>')
    out.append(f'<text x="{left + SIDE / 2:.0f}" y="{TOP + SIDE + 38}" text-anchor="middle">{label}</text>')
    for color, other in zip(COLORS, OTHERS, strict=True):
        points = " ".join(f"{x(n / 1000):.1f},{y(value(n / 1000, other)):.1f}" for n in range(4, 1000, 4))
        out.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.8"/>')
    for n, (color, other) in enumerate(zip(COLORS, OTHERS, strict=True)):
        at = TOP + 20 + 16 * n
        out.append(f'<line x1="{left + 12}" x2="{left + 32}" y1="{at - 4}" y2="{at - 4}" stroke="{color}" '
                   f'stroke-width="2"/><text x="{left + 38}" y="{at}">{fixed} = {other:g}</text>')
    return out


def draw() -> str:
    """The SVG."""
    second = LEFT + SIDE + 130
    body = [*panel(LEFT, "chosen response, pushed up: at most 1 where P_l &lt; 1/2", "P_w", "P_l", chosen),
            *panel(second, "rejected response, pushed down: 1 / (1 - P_l)", "P_l", "P_w", lambda q, p: rejected(p, q))]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'font-family="sans-serif" font-size="12">\n<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n'
            + "\n".join(body) + "\n</svg>\n")


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PATH.exists() and PATH.read_text() == draw() else f"{PATH.name} is out of date; run {__file__}")
    PATH.write_text(draw())
