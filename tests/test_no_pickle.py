"""Nothing is loaded with pickle: a checkpoint or a data file that somebody sent must not be able to run anything."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
OURS = ("lm", "launch", "experiments", "pallas_kernels")
RUN_WHAT_THEY_READ = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Reads published .pth files: its Unpickler finds the few names of tensors and nothing else (tests/models).
ALONE = "lm/models/convert/torch_file.py"


def violations(text: str) -> list[str]:
    """What a module's text loads in a way that could run what it reads."""
    out = []
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        out += [f"line {node.lineno} imports {name}" for name in names if name.split(".")[0] in RUN_WHAT_THEY_READ]
        if not isinstance(node, ast.Call):
            continue
        given = {word.arg: word.value for word in node.keywords}
        pickles = given.get("allow_pickle")
        if pickles is not None and not (isinstance(pickles, ast.Constant) and pickles.value is False):
            out.append(f"line {node.lineno} allows pickles")
        called = ast.unparse(node.func)
        only = given.get("weights_only")
        if called == "torch.load" and not (isinstance(only, ast.Constant) and only.value is True):
            out.append(f"line {node.lineno} calls torch.load without weights_only=True")
        if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "pd.read_pickle"):
            out.append(f"line {node.lineno} calls {called}")
    return out


def test_no_module_of_ours_loads_pickles():
    found = {str(path.relative_to(ROOT)): violations(path.read_text())
             for package in OURS for path in (ROOT / package).rglob("*.py")}
    assert len(found) > 200
    assert found.pop(ALONE) == ["line 10 imports pickle"]
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("text", [
    "import pickle", "from cloudpickle import loads", "def f():\n    import dill as d", "np.load(x, allow_pickle=True)",
    "np.load(x, allow_pickle=asked)", "torch.load(path)", "torch.load(path, weights_only=False)", "yaml.load(text)"])
def test_the_check_sees_each_kind(text):
    assert violations(text)
    assert not violations("np.load(x, allow_pickle=False)\ntorch.load(p, weights_only=True)\nyaml.safe_load(t)")
