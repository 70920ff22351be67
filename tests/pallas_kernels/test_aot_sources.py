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
             "one/api.py": "from pallas_kernels import shared\n"
                           "from pallas_kernels.one import pallas_tpu, pallas_triton\n",
             "one/pallas_tpu.py": "from pallas_kernels.one import vmem\n", "one/vmem.py": "",
             "one/pallas_triton.py": "from pallas_kernels import warps\n", "warps.py": "",
             "two/full_size.py": "import jax\n"}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(sources, "PACKAGE", root)
    sources._imports.cache_clear()
    yield root
    sources._imports.cache_clear()


def test_files_are_followed_through_imports(package):
    names = [str(path.relative_to(package)) for path in sources.source_files("one", "pallas_tpu")]
    assert names == ["__init__.py", "deep.py", "one/__init__.py", "one/api.py", "one/full_size.py", "one/pallas_tpu.py",
                     "one/vmem.py", "shared.py"]


@pytest.mark.parametrize(("name", "changes"), [("deep.py", True), ("one/api.py", True), ("other.py", False),
                                               ("aot/case.py", False), ("two/full_size.py", False)])
def test_only_files_of_the_operation_change_its_hash(package, name, changes):
    before = sources.source_hash("one", "pallas_tpu")
    (package / name).write_text((package / name).read_text() + "\nx = 1\n")
    assert (sources.source_hash("one", "pallas_tpu") != before) is changes
    assert sources.source_hash("one", "pallas_tpu") == sources.source_hash("one", "pallas_tpu")


@pytest.mark.parametrize(("name", "tpu", "triton"), [
    ("one/pallas_triton.py", False, True), ("warps.py", False, True), ("one/pallas_tpu.py", True, False),
    ("one/vmem.py", True, False), ("one/api.py", True, True)])
def test_a_kernel_is_not_made_of_another(package, name, tpu, triton):
    kernels = ("pallas_tpu", "pallas_triton")
    before = [sources.source_hash("one", kernel) for kernel in kernels]
    (package / name).write_text((package / name).read_text() + "\nx = 1\n")
    after = [sources.source_hash("one", kernel) for kernel in kernels]
    assert [x != y for x, y in zip(before, after, strict=True)] == [tpu, triton]


def test_linear_scan_is_made_of_its_kernel_and_the_choice_of_it():
    names = {kernel: {str(path.relative_to(sources.PACKAGE)) for path in sources.source_files("linear_scan", kernel)}
             for kernel in ("pallas_tpu", "pallas_triton", "pallas_mosaic_gpu")}
    assert {"linear_scan/pallas_tpu.py", "linear_scan/config.py", "dispatch.py", "batching.py"} <= names["pallas_tpu"]
    assert not any(name.startswith(("wkv", "aot")) for name in set().union(*names.values()))
    assert not any("gpu" in name or "triton" in name for name in names["pallas_tpu"])
    assert {"linear_scan/pallas_triton.py", "triton_rows.py", "gpu.py"} <= names["pallas_triton"]
    assert {"linear_scan/pallas_mosaic_gpu.py", "mosaic_rows.py", "gpu.py"} <= names["pallas_mosaic_gpu"]
    assert "linear_scan/pallas_tpu.py" not in names["pallas_triton"]
