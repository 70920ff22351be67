"""environment.json: what a run was made with, and of earlier starts what differed."""

import json
import pathlib
import socket
import subprocess
import sys

import pytest

from launch import environment
from launch.environment import collect, git_state, git_states, write_environment


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()

    def git(*words):
        subprocess.run(["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@x", *words], check=True,
                       capture_output=True, timeout=30)

    git("init")
    (folder / "exp.py").write_text("x = 1\n")
    git("add", "exp.py")
    git("commit", "-m", "one", "--no-gpg-sign")
    return folder


def test_the_revision_and_whether_files_differ_from_it(repository):
    state = git_state(repository)
    assert len(state["revision"]) == 40
    assert state["dirty"] is False
    (repository / "exp.py").write_text("x = 2\n")
    assert git_state(repository) == {**state, "dirty": True}
    assert git_state(repository, apart_from=("exp.py",)) == state
    (repository / "new.txt").write_text("x")
    assert git_state(repository, apart_from=("exp.py",))["dirty"]
    assert not git_state(repository, apart_from=("exp.py", "new.txt"))["dirty"]


def test_no_repository_no_git_and_a_file_the_repository_does_not_know(repository, tmp_path, monkeypatch):
    assert git_state(tmp_path) is None
    (repository / "site").mkdir()
    assert git_state(repository / "site", "module.py") is None
    assert git_state(repository, "exp.py") is not None
    monkeypatch.setenv("PATH", "")
    assert git_state(repository) is None


def test_the_experiments_repository_is_that_of_its_file_else_of_the_current_folder(repository, tmp_path, monkeypatch):
    revision = git_state(repository)["revision"]
    monkeypatch.chdir(tmp_path)
    assert git_states(f"{repository / 'exp.py'}:size=3")["experiment"]["revision"] == revision
    assert git_states()["experiment"] is None
    assert git_states("gs://bucket/config.json")["experiment"] is None
    monkeypatch.chdir(repository)
    assert git_states()["experiment"]["revision"] == revision


def test_the_facts_are_there_and_the_host_is_not(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/folder/lm", "train", "--config", "x.py"])
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--some_flag")  # read by nothing on a CPU
    facts = json.loads(json.dumps(collect()))
    assert facts["command"] == ["lm", "train", "--config", "x.py"]
    assert facts["variables"]["LIBTPU_INIT_ARGS"] == "--some_flag"
    assert facts["packages"]["jax"] == sys.modules["jax"].__version__
    assert (facts["devices"]["platform"], facts["devices"]["count"], facts["devices"]["processes"]) == ("cpu", 8, 1)
    assert facts["cpus"] >= 1
    assert socket.gethostname() not in json.dumps({k: v for k, v in facts.items() if k != "git"}) or \
        len(socket.gethostname()) < 4  # "x86" would be in there by chance
    assert str(pathlib.Path.home()) not in json.dumps(facts)


def test_earlier_starts_that_differ_are_kept_newest_first(tmp_path, monkeypatch):
    starts = iter([{"command": [name]} for name in "aabca"])
    monkeypatch.setattr(environment, "collect", lambda spec=None: next(starts))
    for expected in (["a"], ["a"], ["b", "a"], ["c", "b", "a"], ["a", "c", "b"]):
        write_environment(tmp_path)
        found = json.loads((tmp_path / "environment.json").read_text())
        assert [found["command"][0], *(start["command"][0] for start in found["earlier"])] == expected
    assert [path.name for path in tmp_path.iterdir()] == ["environment.json"]


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_file_is_replaced(tmp_path, monkeypatch, text):
    monkeypatch.setattr(environment, "collect", lambda spec=None: {"command": ["a"]})
    (tmp_path / "environment.json").write_text(text)
    write_environment(tmp_path)
    assert json.loads((tmp_path / "environment.json").read_text()) == {"command": ["a"], "earlier": []}
