"""A page of titled sections, and how it becomes one HTML file or Markdown with pictures beside it.

Everything that comes from a run is text and is escaped: a sample may well hold HTML.
"""

import base64
import html
import re
from collections.abc import Sequence
from typing import NamedTuple

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; margin: .8rem 0 }
td, th { padding: .2rem .7rem .2rem 0; text-align: left; border-bottom: 1px solid #e4e4e4; white-space: nowrap }
img { max-width: 100% } pre { background: #f6f6f6; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere }
nav a { margin-right: 1rem } @media (prefers-color-scheme: dark) { body { background: #1b1b1b; color: #ddd }
pre { background: #2a2a2a } td, th { border-color: #444 } img { background: #fff } a { color: #8ab4f8 } }
"""


class Table(NamedTuple):
    """Rows of text under a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    """PNG bytes, and what they show in words."""

    png: bytes
    alt: str


class Verbatim(NamedTuple):
    """Text as it is."""

    text: str


class Section(NamedTuple):
    """blocks: paragraphs (str), tables, pictures and verbatim texts."""

    title: str
    blocks: Sequence[str | Table | Picture | Verbatim]


def to_html(title: str, sections: Sequence[Section]) -> str:
    """One file that needs no other and no network."""
    links = "".join(f'<a href="#{slug(section.title)}">{html.escape(section.title)}</a>' for section in sections)
    parts = ['<!doctype html><html lang="en"><head><meta charset="utf-8">',
             '<meta name="viewport" content="width=device-width">',
             # Even if something slipped through, it would not run and not load anything.
             "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src "
             "'unsafe-inline'\">", f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
             f"<h1>{html.escape(title)}</h1><nav>{links}</nav>"]
    for section in sections:
        parts.append(f'<h2 id="{slug(section.title)}">{html.escape(section.title)}</h2>')
        parts += map(_html, section.blocks)
    return "\n".join([*parts, "</body></html>", ""])


def _html(block: str | Table | Picture | Verbatim) -> str:
    if isinstance(block, Table):
        cells = lambda row, tag: "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)
        return (f"<table><thead><tr>{cells(block.head, 'th')}</tr></thead><tbody>"
                + "".join(f"<tr>{cells(row, 'td')}</tr>" for row in block.rows) + "</tbody></table>")
    if isinstance(block, Picture):
        data = base64.b64encode(block.png).decode()
        return f'<p><img alt="{html.escape(block.alt)}" src="data:image/png;base64,{data}"></p>'
    if isinstance(block, Verbatim):
        return f"<pre>{html.escape(block.text)}</pre>"
    return f"<p>{html.escape(block)}</p>"


def to_markdown(title: str, sections: Sequence[Section], folder: str) -> tuple[str, dict[str, bytes]]:
    """(text, name to PNG of the pictures that it expects in `folder`)."""
    out, pictures = [f"# {_plain(title)}"], {}
    for section in sections:
        out.append(f"## {_plain(section.title)}")
        for block in section.blocks:
            if isinstance(block, Table):
                line = lambda row: "| " + " | ".join(_plain(str(cell)).replace("|", r"\|") for cell in row) + " |"
                out.append("\n".join([line(block.head), "|---" * len(block.head) + "|", *map(line, block.rows)]))
            elif isinstance(block, Picture):
                name = f"{slug(section.title)}-{len(pictures)}.png"
                pictures[name] = block.png
                out.append(f"![{_plain(block.alt)}]({folder}/{name})")
            elif isinstance(block, Verbatim):
                out.append("\n".join("    " + line for line in block.text.splitlines()) or "    ")
            else:
                out.append(_plain(block))
    return "\n\n".join(out) + "\n", pictures


def _plain(text: str) -> str:
    """Text on one line that Markdown shows as it is."""
    return re.sub(r"([\\`*_<>\[\]])", r"\\\1", " ".join(text.split()))


def slug(title: str) -> str:
    """A name for links and files."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
