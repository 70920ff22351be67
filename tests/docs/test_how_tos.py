"""The code of the documents works: what a reader copies trains, and passes the contract that the page promises.

A fenced block is run where the line above it says how: `<!-- run: file PATH -->` a complete new file, `entry TABLE` a
line of a table, `row layers|losses` rows of a contract table, `model`, `loss` and `mesh N` lines that set a config, the
last one for N devices.
"""

import ast
import importlib.util
import inspect
import io
import pathlib
import re
import sys
import tokenize
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "tests" / "contracts"))

import test_experiment_contract as experiments  # noqa: E402
import test_layer_contract as layers  # noqa: E402
import test_loss_contract as losses  # noqa: E402

from launch import config as configs  # noqa: E402
from lm.layers import LAYERS  # noqa: E402
from lm.losses import LOSSES  # noqa: E402
from lm.tasks.build import build_objective  # noqa: E402

HOW_TOS = ("add-a-layer", "add-a-loss", "add-an-experiment")


class Block(NamedTuple):
    """A runnable block. kind: first word of its marker; about: the rest; code: its lines."""

    kind: str
    about: str
    code: str


def blocks(page: str) -> list[Block]:
    """The runnable blocks of a page in order."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    return [Block(*found) for found in re.findall(r"<!-- run: (\w+) ?([^\n]*?) ?-->\n```python\n(.*?)```", text, re.S)]


def only(page: str, kind: str) -> Block:
    (block,) = (block for block in blocks(page) if block.kind == kind)
    return block


def install(page: str, table: dict, folder: pathlib.Path, monkeypatch) -> dict[str, Any]:
    """Puts the new file of a page where imports find it, and its class into the table; returns the file's names."""
    block = only(page, "file")
    assert not (ROOT / block.about).exists(), f"{block.about} exists by now: the page needs another example"
    path = folder / pathlib.Path(block.about).name
    path.write_text(block.code)
    name = block.about.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    for key, value in eval(f"{{{only(page, 'entry').code}}}", vars(module)).items():
        monkeypatch.setitem(table, key, value)
    return vars(module)


def contract(module: ModuleType, argument: str, value: Any) -> dict[str, Any]:
    """Every test of a contract that takes `argument`, bound to this value, once a value of its other parameter."""
    out = {}
    for name, test in vars(module).items():
        if not name.startswith("test_") or argument not in inspect.signature(test).parameters:
            continue
        others = [mark.args for mark in test.pytestmark if mark.args[0] != argument]
        assert len(others) < 2, f"{name} has more parameters than this reads"
        for case in others[0][1] if others else [None]:
            out[f"{name} {case}"] = (test, {argument: value, **({others[0][0]: case} if others else {})})
    return out


def set_config(code: str) -> ConfigDict:
    """A config with the smallest model on which the lines of a page were run."""
    config = ConfigDict({group: {} for group in configs.GROUPS}, allow_dotted_keys=True)
    config.model = dict(attention=dict(num_heads=4))
    exec(code, {"config": config})
    return config


def test_the_new_layer_passes_the_whole_contract(tmp_path, monkeypatch):
    names = install("add-a-layer", LAYERS, tmp_path, monkeypatch)
    ((_, layer),) = eval(f"[{only('add-a-layer', 'row').code}]", names)
    tests = contract(layers, "layer", layer)
    assert len(tests) > 12
    for test, arguments in tests.values():
        test(**arguments)


def test_a_wrong_layer_does_not_pass(tmp_path, monkeypatch):
    """The loop above could run nothing: without its line about resets the layer of the page must fail."""
    names = install("add-a-layer", LAYERS, tmp_path, monkeypatch)
    code = only("add-a-layer", "file").code
    wrong = code.replace("jnp.where(ctx.reset[..., None], 0.0, rate)", "jnp.broadcast_to(rate, x.shape)")
    assert wrong != code
    exec(compile(wrong, "wrong.py", "exec"), names)
    test, arguments = contract(layers, "layer", names["CausalEMA"]())["test_packed_equals_separate None"]
    with pytest.raises(AssertionError):
        test(**arguments)


@pytest.mark.slow
def test_the_new_layer_trains(tmp_path, monkeypatch):
    install("add-a-layer", LAYERS, tmp_path, monkeypatch)
    config = configs.resolve(set_config(only("add-a-layer", "model").code), [
        ("data", experiments.TEXTS), ("train.batch_size", 8), *experiments.SHORT, *experiments.ON_EIGHT])
    rows = experiments.two_steps(config, tmp_path / "run")
    assert rows[1]["train/loss"] != rows[0]["train/loss"]


def test_the_new_loss_passes_the_whole_contract(tmp_path, monkeypatch):
    names = install("add-a-loss", LOSSES, tmp_path, monkeypatch)
    for _, loss in eval(f"[{only('add-a-loss', 'row').code}]", names):
        tests = contract(losses, "loss", loss)
        assert len(tests) > 6
        for test, arguments in tests.values():
            test(**arguments)


def test_the_new_loss_is_a_name_in_configs(tmp_path, monkeypatch):
    install("add-a-loss", LOSSES, tmp_path, monkeypatch)
    given = set_config(only("add-a-loss", "loss").code)
    objective = build_objective(configs.resolve(given).loss.to_dict())
    assert dict(objective.weights) == {"focal": 1.0, "z_loss": 1e-4}
    assert objective.terms["focal"].loss.gamma == 1.5
    assert configs.resolve(given, [("loss.focal.gamma", "3")]).loss.focal.gamma == 3.0


def test_the_new_experiment_is_under_contract_and_runs(tmp_path):
    block = only("add-an-experiment", "file")
    path = tmp_path / pathlib.Path(block.about).name
    path.write_text(block.code)
    experiments.test_docstring_says_claim_command_and_expectation(path)
    assert configs.load(f"{path}:3").train.seed == 3
    config = experiments.shrunken(path)
    assert list(config.model.pattern) == ["near/mlp", "far/mlp"] and config.model.near.window == 8
    assert [row["step"] for row in experiments.two_steps(config, tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("block", [b for b in blocks("sharding") if b.kind == "mesh"], ids=lambda b: b.about)
def test_example_meshes_fit_their_devices(block):
    config = configs.resolve(set_config(block.code))
    configs.check(config, int(block.about))
    with pytest.raises(ValueError, match="devices"):
        configs.check(config, int(block.about) // 2 + 1)


def code_lines(code: str) -> int:
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    texts: set[int] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts |= set(range(node.lineno, node.end_lineno + 1))
    lines: set[int] = set()
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type not in empty:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - texts)


@pytest.mark.parametrize("page", HOW_TOS)
def test_a_how_to_takes_less_than_30_lines_of_code(page):
    """The file without its imports, and the lines in the tables."""
    count = sum(len(block.code.splitlines()) for block in blocks(page) if block.kind in ("entry", "row"))
    code = only(page, "file").code
    imports = len(re.findall(r"^(?:import|from) ", code, re.M))
    assert 5 < code_lines(code) - imports + count < 30


def test_lines_of_code_are_counted_without_words():
    code = '"""Words.\n\nMore."""\n\n# Why.\nx = (1,\n     2)\n\ndef f():\n    """Words."""\n    return x\n'
    assert code_lines(code) == 4
