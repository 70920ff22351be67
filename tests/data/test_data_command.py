"""`lm data`: prepare writes what show reads back, and mistakes are one line."""

import json

import pytest

from launch import cli
from launch.data import parse_tokenizer


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"Document {i} says hello.\nIt ends here" for i in range(12)), encoding="utf-8")
    return path


def run(capsys, *argv):
    code = cli.main(["data", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_prepare_then_show(tmp_path, text, capsys):
    out = tmp_path / "tokens"
    code, printed, _ = run(capsys, "prepare", "--source", "text", "--path", text, "--separator", r"\n\n",
                           "--tokenizer", '{"kind": "bytes", "eos_id": 0}', "--out", out)
    assert code == 0 and "12 documents" in printed
    assert json.loads((out / "manifest.json").read_text())["num_documents"] == 12
    code, printed, _ = run(capsys, "show", "--source", "array_record", "--path", out, "--seq-len", 80, "--rows", 2)
    assert code == 0
    assert "row 0: 2 documents, 70 of 80 positions, 68 targets, 10 padding" in printed
    assert "1 [0:35] positions 0 to 34, 34 targets" in printed
    assert "says hello.↵It ends her⟦e⟧" in printed


def test_show_reads_a_config_and_flags_override_it(tmp_path, text, capsys):
    config = tmp_path / "experiment.py"
    config.write_text("from ml_collections import ConfigDict\n\n\ndef get_config():\n"
                      f"    return ConfigDict(dict(data=dict(source='text', path={str(text)!r}, separator='\\n\\n'), "
                      "model=dict(embed_dim=8, num_layers=1, attention=dict(num_heads=2)), train=dict(seq_len=40)))\n",
                      encoding="utf-8")
    code, printed, _ = run(capsys, "show", "--config", config, "--rows", 1, "--config.data.packing=concat")
    assert code == 0 and "positions, " in printed and "of 40 positions" in printed
    code, printed, _ = run(capsys, "show", "--config", config, "--source", "pydoc", "--seq-len", 64, "--rows", 1)
    assert code == 0 and "source pydoc" in printed


@pytest.mark.parametrize(("argv", "message"), [
    (["shw"], "no action 'shw'; did you mean 'show'"),
    (["prepare", "--source", "pydoc"], "needs --out DIR"),
    (["prepare", "--out", "x"], "needs --source"),
    (["show", "--source", "pydoc", "--rows", "0"], "--rows must be at least 1"),
    (["show", "--source", "pydoc", "--split", "test"], "no split 'test'"),
    (["show", "--source", "pydoc", "--tokenizer", "{kind"], "--tokenizer is not JSON"),
    (["show", "--source", "pydoc", "--config.data.packing=concat"], "give --config FILE"),
])
def test_mistakes_are_one_line(capsys, argv, message):
    code, _, err = run(capsys, *argv)
    assert code == 2 and message in err and err.strip().count("\n") == 0


def test_tokenizer_flag_forms():
    assert parse_tokenizer("bytes") == "bytes"
    assert parse_tokenizer("tiktoken:a/b.tiktoken") == {"kind": "tiktoken", "path": "a/b.tiktoken"}
    assert parse_tokenizer('{"kind": "bytes", "eos_id": 0}') == {"kind": "bytes", "eos_id": 0}
