"""Imports point one way. The table is the architecture: what each package may import of this project."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

ALLOWED = {
    "pallas_kernels": set(),
    "lm.core": set(),
    "lm.layers": {"lm.core", "pallas_kernels"},
    "lm.models": {"lm.core", "lm.layers"},
    "lm.losses": {"lm.core"},
    "lm.optim": {"lm.core"},
    "lm.adapters": {"lm.core"},
    "lm.generate": {"lm.core"},
    "lm.data": {"lm.core.batch", "lm.core.fields", "lm.core.goldfish"},
    "lm.eval": {"lm.core", "lm.data", "lm.losses", "lm.generate"},
    "lm.tasks": {"lm.core", "lm.data", "lm.losses", "lm.eval", "lm.generate"},
    "lm.train": {"lm.core", "lm.tasks", "lm.optim", "lm.adapters", "lm.losses"},
    "lm.analysis": {"lm.core", "lm.layers"},
    "lm.claims": {"lm.core", "lm.data", "lm.eval", "lm.generate", "lm.losses", "lm.models", "lm.optim", "lm.tasks",
                  "lm.train", "pallas_kernels"},
    "lm.report": {"lm.core", "lm.train"},
    "lm.scaling": set(),
    "experiments": set(),
    "launch": {"lm", "experiments", "pallas_kernels"},
}
OURS = ("lm", "launch", "experiments", "pallas_kernels")

# Packages that could be used alone name all that they need.
ONLY = {
    "pallas_kernels": {"jax", "numpy"},
    "experiments": {"ml_collections"},
}
WITHOUT_JAX = ("lm.data", "lm/core/batch.py", "lm/core/fields.py", "lm/core/goldfish.py", "lm/core/goldfish_hash.py",
               "lm/core/goldfish_umd.py")


def imports(path: pathlib.Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            out |= {f"{node.module}.{alias.name}" for alias in node.names}
    return out


def files(package: str) -> list[pathlib.Path]:
    return sorted((ROOT / package.replace(".", "/")).rglob("*.py"))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    wrong = []
    for path in files(package):
        for name in imports(path):
            if any(within(name, ours) for ours in OURS) and not any(
                    within(name, allowed) for allowed in {package, *ALLOWED[package]}):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_package_is_in_the_table():
    found = {f"lm.{path.name}" for path in (ROOT / "lm").iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert found == {package for package in ALLOWED if package.startswith("lm.")}


@pytest.mark.parametrize("package", ONLY)
def test_packages_that_stand_alone(package):
    import sys
    for path in files(package):
        foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {package}
        assert foreign <= ONLY[package], f"{path.relative_to(ROOT)} imports {foreign - ONLY[package]}"


@pytest.mark.parametrize("place", WITHOUT_JAX)
def test_data_never_touches_a_device(place):
    for path in files(place) if not place.endswith(".py") else [ROOT / place]:
        assert not {n for n in imports(path) if n.split(".")[0] in ("jax", "flax", "optax")}, path


def test_no_file_is_named_after_nothing():
    names = {path.stem for package in OURS for path in files(package)}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc"}


def test_the_check_sees_a_wrong_import(tmp_path):
    """The test above could pass by reading nothing: it must see an import that is hidden in a function."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from lm.models import build\n")
    assert imports(wrong) == {"lm.models.build"}
