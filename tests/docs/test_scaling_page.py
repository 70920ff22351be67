"""The ladder of docs/scaling.md: what a reader copies resolves, costs what the page says, and trains."""

import importlib.util
import json
import pathlib
import re

import pytest

from launch import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "scaling.md").read_text()


@pytest.fixture
def sizes(tmp_path):
    """The file of the page."""
    ((name, code),) = re.findall(r"<!-- run: file (\S+) -->\n```python\n(.*?)```", PAGE, re.S)
    assert not (ROOT / name).exists(), f"{name} exists by now: the page needs another example"
    path = tmp_path / pathlib.Path(name).name
    path.write_text(code)
    return path


def test_the_ladder_of_the_page_resolves_and_costs_what_it_says(sizes, tmp_path, capsys):
    assert cli.main(["scale", "--config", str(sizes), "--workdir", str(tmp_path / "w"), "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    planned = {cells[0]: cells[1:3] for line in said if len(cells := line.split()) == 5 and "-tpp20-" in line}
    assert len(planned) == 14
    table = dict(re.findall(r"^\| (\d+-tpp20-s\d) \| (\S+ \| \S+) \|", PAGE, re.M))
    assert {name: cells.split(" | ") for name, cells in table.items()} == {
        name: cells for name, cells in planned.items() if name in table}
    assert len(table) >= 5


@pytest.mark.slow
def test_the_ladder_of_the_page_trains(sizes, tmp_path):
    """In small: three sizes, a bit of their training."""
    code = cli.main(["scale", "--config", str(sizes), "--workdir", str(tmp_path / "w"), "--param",
                     "model.embed_dim=16,24,32", "--seeds", "0", "--tokens-per-parameter", "2", "--resamples", "5",
                     "--config.train.batch_size=8", "--config.train.seq_len=32", "--config.eval.batches=4"])
    found = json.loads((tmp_path / "w" / "scale.json").read_text())
    assert code in (0, 1) and found["failed"] == [] and len(found["runs"]) == 3  # so short runs may follow no law
    rows = (tmp_path / "w/cells/16-tpp2-s0/run/parameters.txt").read_text()
    assert re.search(r"mlp/up/kernel .* 2\.0 ", rows), rows  # half of the base width, twice its learning rate


def test_the_page_names_all_fields_of_a_ladder():
    import dataclasses

    from launch.scales.definition import Definition
    missing = [field.name for field in dataclasses.fields(Definition) if f"`{field.name}`" not in PAGE]
    assert missing == []
    assert importlib.util.find_spec("scipy")
