"""The presets are held to what every experiment is held to."""

import pytest
import test_experiment_contract as contract

FOLDER = contract.FOLDER / "presets"
FILES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "__init__")
files = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])


@files
def test_docstring_says_claim_command_and_expectation(path):
    lines = path.read_text().splitlines()
    for title in ("Claim", "Command", "Expected"):
        assert any(line.startswith(f"{title}: ") for line in lines), f"{path.name} has no line '{title}: '"


@files
@pytest.mark.slow
def test_full_size_step_lowers_on_eight_devices(path):
    contract.test_full_size_step_lowers_on_eight_devices(path)


@files
@pytest.mark.slow
def test_two_real_steps_of_the_shrunken_form(path, tmp_path):
    contract.test_two_real_steps_of_the_shrunken_form(path, tmp_path)
