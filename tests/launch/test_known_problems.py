"""Each known problem is found where it applies, and only there."""

import pytest

from launch.known_problems import BROKEN, NOTE, RULES, Facts, known_problems, unmet_requirements

OLD = {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}
NEW = {"jax": "0.12.0.1", "jaxlib": "0.12.0.1", "flax": "0.12.12"}


def find(versions, devices=(), platforms="", python=(3, 12)):
    return [(problem.level, problem.what) for problem in known_problems(Facts(versions, devices, platforms, python))]


def test_the_tested_versions_have_no_problem():
    assert find(NEW) == []
    assert find({**NEW, "jax-cuda13-plugin": "0.12.0.1"}, ("gpu",), python=(3, 13)) == [
        (NOTE, next(what for _, _, what, _ in RULES if "Pallas-Triton" in what))]
    assert find({**NEW, "libtpu": "0.0.50"}, ("tpu",)) == []
    assert find(OLD) == []


@pytest.mark.parametrize(("versions", "devices", "platforms", "python", "level", "words"), [
    (OLD, (), "", (3, 10), BROKEN, "Python is older than 3.11"),
    ({**OLD, "jax": "0.9.1"}, (), "", (3, 11), BROKEN, "jax is older than 0.10.2"),
    ({**OLD, "flax": "0.12.7"}, (), "", (3, 11), BROKEN, "flax is older than 0.12.8"),
    ({**NEW, "flax": "0.12.8"}, (), "", (3, 12), BROKEN, "jax 0.11.1 removed a class"),
    ({**NEW, "jax-cuda12-plugin": "1", "jax-cuda13-plugin": "1"}, ("gpu",), "", (3, 12), BROKEN, "two CUDA versions"),
    ({**NEW, "jax-cuda13-plugin": "1", "libtpu": "1"}, ("gpu",), "", (3, 12), NOTE, "libtpu and a CUDA plugin"),
    (OLD, (), "", (3, 11), NOTE, "Python 3.11 gets at most jax 0.10.2"),
    ({**OLD, "tokamax": "0.0.12"}, (), "", (3, 11), NOTE, "current tokamax needs"),
    ({**OLD, "tokamax": "0.0.17"}, (), "", (3, 12), NOTE, "current tokamax needs"),
    ({**NEW, "libtpu": "1"}, (), "", (3, 12), NOTE, "libtpu is installed and this machine has no TPU"),
    ({**NEW, "jax-cuda13-plugin": "1"}, (), "", (3, 12), NOTE, "a CUDA plugin is installed"),
    (NEW, ("gpu",), "", (3, 12), BROKEN, "this machine has a GPU and no plugin"),
    (NEW, ("tpu",), "", (3, 12), BROKEN, "this machine has a TPU and libtpu is not installed"),
])
def test_a_problem_is_found(versions, devices, platforms, python, level, words):
    assert any(found == level and words in what for found, what in find(versions, devices, platforms, python))


@pytest.mark.parametrize(("versions", "devices", "platforms", "words"), [
    (NEW, ("gpu",), "cpu", "no plugin"), (NEW, ("tpu",), "cpu", "libtpu is not installed"),
    ({**NEW, "jax-rocm7-plugin": "1"}, ("gpu",), "", "no plugin"),
    ({**NEW, "tokamax": "0.0.17"}, (), "", "tokamax"),
    ({**NEW, "jax": "0.11.0", "flax": "0.12.8"}, (), "", "removed a class"),
    ({**NEW, "jax-cuda13-plugin": "1", "libtpu": "1"}, ("gpu",), "cuda", "libtpu and a CUDA plugin"),
])
def test_a_problem_is_not_found_where_it_is_none(versions, devices, platforms, words):
    assert not any(words in what for _, what in find(versions, devices, platforms))


def test_every_problem_says_what_to_do():
    assert all(what and remedy and level in (BROKEN, NOTE) for level, _, what, remedy in RULES)


def test_requirements_that_are_not_met_are_found():
    requires = {"flax": ["jax>=0.11.1", "numpy>=1.23", "clu<=0.1; extra == 'testing'", "tomli; python_version < '3'"],
                "jax": ["jaxlib<=0.12.0.1,>=0.11.2", "libtpu==0.0.50.*; extra == \"tpu\"", "ml_dtypes>=0.5",
                        "this is no requirement!"]}
    versions = {"flax": "0.12.12", "jax": "0.10.2", "jaxlib": "0.12.0.1", "numpy": "2.4", "clu": "9", "tomli": "1",
                "libtpu": "0.0.42", "ml-dtypes": "0.4"}
    found = unmet_requirements(versions, requires)
    assert [(p.level, p.what) for p in found] == [
        (BROKEN, "flax 0.12.12 asks for jax>=0.11.1; 0.10.2 is installed"),
        (NOTE, "jax 0.10.2 asks for libtpu==0.0.50.*; 0.0.42 is installed"),
        (BROKEN, "jax 0.10.2 asks for ml_dtypes>=0.5; 0.4 is installed")]
    assert unmet_requirements({**versions, "jax": "0.12", "libtpu": "0.0.50.1", "ml-dtypes": "0.6"}, requires) == []
