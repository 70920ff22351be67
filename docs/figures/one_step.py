"""Draws docs/figures/one_step.svg, the data flow of one train step: `python docs/figures/one_step.py [--check]`."""

import pathlib
import sys
from xml.sax.saxutils import escape

PATH = pathlib.Path(__file__).with_suffix(".svg")

# Three bands of boxes: heading, direction (1 left to right, -1 right to left), boxes as (title, lines, file).
BANDS = [
    ("On the host, in numpy: a pure function of (data options, seed, step)", 1, [
        ("Documents", ["files, folders, gs://", "or an installed package"], "lm/data/sources.py"),
        ("Token ids", ["one sequence a document,", "length and content hash"], "lm/data/encoding.py"),
        ("Plan of rows", ["which piece of which", "document stands where"], "lm/data/packing.py"),
        ("Batch [B, T]", ["tokens, targets, weights,", "segment_ids, positions"], "lm/data/loader.py"),
        ("Global arrays", ["each process puts its rows;", "split over the mesh"], "lm/train/feed.py"),
    ]),
    ("On the devices, forward: one jitted function, here one of M microbatches", -1, [
        ("Microbatch m", ["rows m, m + M, m + 2M, ...;", "counts of the whole batch"], "lm/train/step.py"),
        ("Hidden [B, T, D]", ["embed, L blocks, norm:", "(x, state, ctx) -> (y, ...)"], "lm/models/decoder.py"),
        ("Token scores [B, T]", ["logits in chunks of time:", "logp, logsumexp, argmax"], "lm/losses/cross_entropy.py"),
        ("Losses [B, T]", ["one value a position,", "one loss a term"], "lm/losses"),
        ("Means", ["total = sum(value * weight)", "and count, a term"], "lm/tasks/language_modeling.py"),
    ]),
    ("On the devices, backward and update", 1, [
        ("Loss", ["sum over terms of weight", "* total / count of the batch"], "lm/train/step.py"),
        ("Gradient", ["of trainable parameters,", "summed over microbatches"], "lm/train/step.py"),
        ("Updates", ["clip, direction, decay,", "multiplier, learning rate"], "lm/optim/builder.py"),
        ("Finite?", ["if not, parameters and", "moments stay as they were"], "lm/train/step.py"),
        ("New TrainState", ["params, opt_state, carry,", "ema, key, step + 1, ..."], "lm/train/state.py"),
    ]),
]

BOX, HEIGHT, GAP, BAND, LEFT, TOP = 192, 86, 26, 150, 24, 46
WIDTH = 2 * LEFT + 5 * BOX + 4 * GAP


def text(x: float, y: float, words: str, size: int, style: str = "", anchor: str = "start") -> str:
    """One line of text."""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" {style}>{escape(words)}</text>'


def arrow(*points: tuple[float, float], dashed: bool = False) -> str:
    """A line through the points with a head at its end."""
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    path = " ".join(f"{x},{y}" for x, y in points)
    return (f'<polyline points="{path}" fill="none" stroke="#444" stroke-width="1.5"{dashes} '
            'marker-end="url(#head)"/>')


def draw() -> str:
    """The whole figure as SVG."""
    height = TOP + 2 * BAND + HEIGHT + 22
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
           'font-family="Helvetica, Arial, sans-serif">',
           "<title>Data flow of one train step, from documents on disk to updated parameters</title>",
           '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
           'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#444"/></marker></defs>',
           f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>']
    for band, (heading, direction, boxes) in enumerate(BANDS):
        y = TOP + band * BAND
        fill = ("#eef4fb", "#f3f8ee", "#fdf3e7")[band]
        # The arrow that comes down into the first box of the last band passes where its heading would begin.
        begin = LEFT + (BOX / 2 + 16 if band == 2 else 0)
        out.append(text(begin, y - 14, heading, 14, 'fill="#222" font-weight="bold"'))
        for n, (title, lines, file) in enumerate(boxes):
            x = LEFT + (n if direction == 1 else 4 - n) * (BOX + GAP)
            out.append(f'<rect x="{x}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="5" fill="{fill}" stroke="#888"/>')
            middle = x + BOX / 2
            out.append(text(middle, y + 21, title, 14, 'fill="#111" font-weight="bold"', "middle"))
            out += [text(middle, y + 40 + 15 * k, line, 12, 'fill="#333"', "middle") for k, line in enumerate(lines)]
            out.append(text(middle, y + 76, file, 10, 'fill="#666" font-family="monospace"', "middle"))
            if n < 4:
                start = (x + BOX, y + HEIGHT / 2) if direction == 1 else (x, y + HEIGHT / 2)
                out.append(arrow(start, (start[0] + direction * GAP, start[1])))
            elif band < 2:  # down to the next band, which begins under this box
                out.append(arrow((middle, y + HEIGHT), (middle, y + BAND)))
    last, below = WIDTH - LEFT - BOX / 2, TOP + 2 * BAND
    out.append(arrow((last, below), (last, below - BAND + HEIGHT), dashed=True))
    out.append(text(last - 10, below - 28, "state of the next step", 12, 'fill="#333"', "end"))
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PATH.read_text() == draw() else f"{PATH.name} is out of date: run python {sys.argv[0]}")
    PATH.write_text(draw())
