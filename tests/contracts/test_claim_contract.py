"""What every claim file must hold. Files are found by globbing: a new one is under contract by being there."""

import pytest

from launch import claim as command
from launch import config as configs
from lm.claims.definition import TITLES, names, read
from lm.claims.measures import MEASURES
from lm.claims.page import generate
from lm.claims.store import read_json
from lm.claims.verdict import ALLOWED_SHARE, judge

NAMES = names(command.FOLDER)
claims = pytest.mark.parametrize("name", NAMES)
RECORDS = {path.stem: read_json(path) for path in sorted(command.RECORDS.glob("*.json"))}
RUNS = [(name, n) for name, record in RECORDS.items() for n in range(len(record["runs"]))]


def test_there_are_claims():
    assert {"minrnn_scan", "minrnn_copy"} <= set(NAMES) and set(RECORDS) <= set(NAMES)


@claims
def test_docstring_says_claim_command_hardware_and_expectation(name):
    text = read(name, command.FOLDER).text
    assert set(text) == set(TITLES) and all(text.values())
    assert text["Command"].startswith(f"lm claim {name} --workdir ")


@claims
@pytest.mark.parametrize("full", [False, True])
def test_every_cell_of_the_grid_resolves_and_has_three_seeds(name, full):
    claim = read(name, command.FOLDER)
    cells = claim.cells(full)
    assert all(cell.measure == "train" or cell.measure in MEASURES for cell in cells)
    resolve = lambda cell: configs.resolve(claim.module.get_config(), cell.overrides)
    hashes = {(configs.config_hash(resolve(cell)), cell.measure, str(cell.then)) for cell in cells}
    assert len(hashes) == len(cells), "two cells are the same run"


@pytest.mark.parametrize("name, n", RUNS, ids=[f"{name}-{RECORDS[name]['runs'][n]['run']}" for name, n in RUNS])
def test_recorded_results_give_the_recorded_verdict_and_shuffled_ones_do_not(name, n):
    """The check as it stands now judges what was found then; dealt out at random, the results fail it."""
    run = RECORDS[name]["runs"][n]
    verdict = judge(read(name, command.FOLDER).module.check, run["cells"])
    assert verdict["passed"] == run["verdict"]["passed"]
    assert [c["what"] for c in verdict["criteria"]] == [c["what"] for c in run["verdict"]["criteria"]]
    control = verdict["control"]
    assert control is None or control["passed"] <= ALLOWED_SHARE * control["shuffles"]
    assert all(cell["attempts"] and "config_hash" in cell for cell in run["cells"])
    assert run["packages"]["jax"] and run["revision"]


def test_the_page_is_current():
    found = [read(name, command.FOLDER) for name in NAMES]
    assert command.PAGE.read_text() == generate(found, {name: RECORDS.get(name) for name in NAMES}), \
        "run `lm claim --page` and commit the page"
