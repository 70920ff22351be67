"""The hash of an operation's sources changes with every file that it is made of, and with no other."""

import pytest

from pallas_kernels.aot import sources


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two operations with one shared file."""
    root = tmp_path / "pallas_kernels"
    files = {"__init__.py": "", "shared.py": "import pallas_kernels.deep\n", "deep.py": "", "other.py": "",
             "aot/__init__.py": "", "aot/case.py": "", "one/__init__.py": "", "two/__init__.py": "",
             "one/full_size.py": "import jax\nfrom pallas_kernels.aot.case import Case\n"
                                 "from pallas_kernels.one import api\n",
             "one/api.py": "from pallas_kernels import shared\n", "two/full_size.py": "import jax\n"}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(sources, "PACKAGE", root)
    sources._imports.cache_clear()
    yield root
    sources._imports.cache_clear()


def test_files_are_followed_through_imports(package):
    names = [str(path.relative_to(package)) for path in sources.source_files("one")]
    assert names == ["__init__.py", "deep.py", "one/__init__.py", "one/api.py", "one/full_size.py", "shared.py"]


@pytest.mark.parametrize(("name", "changes"), [("deep.py", True), ("one/api.py", True), ("other.py", False),
                                               ("aot/case.py", False), ("two/full_size.py", False)])
def test_only_files_of_the_operation_change_its_hash(package, name, changes):
    before = sources.source_hash("one")
    (package / name).write_text((package / name).read_text() + "\nx = 1\n")
    assert (sources.source_hash("one") != before) is changes
    assert sources.source_hash("one") == sources.source_hash("one")


def test_linear_scan_is_made_of_its_kernel_and_the_choice_of_it():
    names = {str(path.relative_to(sources.PACKAGE)) for path in sources.source_files("linear_scan")}
    assert {"linear_scan/pallas_tpu.py", "linear_scan/config.py", "dispatch.py", "batching.py"} <= names
    assert not any(name.startswith(("wkv", "aot")) for name in names)
