"""The documents hold together: links lead somewhere, named files and functions exist, tables are those of the code."""

import importlib
import pathlib
import re
import subprocess
import sys

import pytest

from lm.core.axes import MESH_AXES, RULES

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
pages = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(DOCS)) for page in PAGES])


def prose(page: pathlib.Path) -> str:
    """The text of a page without fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def anchors(page: pathlib.Path) -> set[str]:
    """The names that a page's headings have in links."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}: no such heading"


@pages
def test_named_files_exist(page):
    """Every path below a folder of the project; but files that the page tells the reader to write, and patterns."""
    text = page.read_text()
    new = set(re.findall(r"<!-- run: file (\S+) -->", (DOCS / "add-an-experiment.md").read_text() + text))
    folders = "lm|launch|experiments|tests|docs|pallas_kernels"
    named = re.findall(rf"(?<![\w/.>-])((?:{folders})/[\w./-]*\w)(?![\w<{{*])", text)
    missing = [name for name in sorted({*named} - new) if not (ROOT / name).exists()]
    assert not missing, f"{page.name} names {', '.join(missing)}"


@pages
def test_named_functions_exist(page):
    """`lm.package.module.name` can be imported."""
    for dotted in sorted(set(re.findall(r"`((?:lm|launch)(?:\.\w+)+)[`(]", page.read_text()))):
        parts = dotted.split(".")
        files = [n for n in range(len(parts), 0, -1) if (path := ROOT.joinpath(*parts[:n])).is_dir()
                 or path.with_suffix(".py").exists()]
        assert files, f"{page.name} names {dotted}"
        thing = importlib.import_module(".".join(parts[:files[0]]))
        for part in parts[files[0]:]:
            assert hasattr(thing, part), f"{page.name} names {dotted}"
            thing = getattr(thing, part)


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text()
    missing = [page.name for page in PAGES if f"]({page.relative_to(DOCS)})" not in index]
    assert missing == ["README.md"]


@pytest.mark.parametrize("script", sorted((DOCS / "figures").glob("*.py")), ids=lambda path: path.stem)
def test_figures_are_current(script):
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def section(page: str, title: str) -> list[list[str]]:
    """Cells of the rows of the table under a heading."""
    text = (DOCS / page).read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows, f"{page} has no table under {title}"
    return rows


def test_the_tables_of_axes_are_those_of_the_code():
    assert tuple(row[0].strip("`") for row in section("sharding.md", "Mesh axes")) == MESH_AXES
    assert {row[0].strip("`"): tuple(re.findall(r"`(\w+)`", row[1]))
            for row in section("sharding.md", "Logical axes")} == RULES


def test_the_checks_see_what_is_wrong(tmp_path):
    """They could pass by reading nothing."""
    page = tmp_path / "page.md"
    page.write_text("# A title, here\n[gone](gone.md), `lm/gone.py`, `lm.core.gone.f`\n```\n[no](link.md)\n```\n")
    assert anchors(page) == {"a-title-here"}
    for check in (test_links_lead_somewhere, test_named_files_exist, test_named_functions_exist):
        with pytest.raises(AssertionError, match="gone"):
            check(page)
