"""The generated config reference: current, complete, and valid Markdown tables."""

import dataclasses
import re

import pytest

from launch import reference
from launch.config_groups import OPTION_CLASSES, option_class
from lm.core.fields import field_types, option


def test_the_page_is_current():
    assert reference.PATH.read_text() == reference.generate(), "run `python -m launch.reference` and commit the page"


def test_every_option_has_a_line_of_documentation():
    for group in OPTION_CLASSES:
        missing = [name for name, line in reference.documentation(option_class(group)).items() if not line]
        assert missing == [], f"config.{group}"


def test_every_field_is_in_the_page():
    page = reference.generate()
    sections = {part.split("\n")[0]: part for part in re.split(r"(?m)^## ", page)}
    for group in OPTION_CLASSES:
        for name in field_types(option_class(group)):
            assert f"\n| `{name}` | " in sections[f"config.{group}"]
    from lm.layers import LAYERS
    for name in LAYERS:
        assert f"\n### layer `{name}`\n" in page


def test_every_table_row_has_the_cells_of_its_heading():
    cells = None
    for line in reference.generate().splitlines():
        if not line.startswith("|"):
            cells = None
            continue
        found = len(re.findall(r"(?<!\\)\|", line))
        assert found == (cells or found), line
        cells = found


@dataclasses.dataclass(frozen=True)
class Sample:
    """What it is, in
    two lines.

    width: of something, e.g. `x: y`. depth: of
      another, 1.5 by default. Neither is a size: it is a count.
    """

    width: int
    depth: float | None = 1.5
    mode: str = option("a|b", "one of a | b")
    act: object = max


def test_rows_come_from_the_class():
    assert reference.rows(Sample) == [
        "| `width` | `int` | required | of something, e.g. `x: y` |",
        "| `depth` | `float \\| None` | `1.5` | of another, 1.5 by default. Neither is a size: it is a count |",
        "| `mode` | `str` | `'a\\|b'` | one of a \\| b |",
        "| `act` | `object` | `max` |  |"]
    assert reference.section("## t", Sample).startswith("## t\n\nWhat it is, in two lines.\n\n| field |")


def test_the_check_fails_on_an_old_page_and_writing_mends_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(reference, "PATH", tmp_path / "docs" / "page.md")
    monkeypatch.setattr("sys.argv", ["reference", "--check"])
    assert reference.main() == 1
    assert "out of date" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["reference"])
    assert reference.main() == 0
    monkeypatch.setattr("sys.argv", ["reference", "--check"])
    assert reference.main() == 0
    with pytest.raises(SystemExit):
        monkeypatch.setattr("sys.argv", ["reference", "--wrong"])
        reference.main()
