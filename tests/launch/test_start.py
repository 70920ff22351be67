"""What is said where a run begins from another one."""

import logging

import pytest

from launch import config as configs
from launch.start import compare_tokenizers
from lm.data.corpora import load_tokenizer
from lm.data.tokenizer import build_tokenizer

WITH_EOS = {"kind": "bytes", "eos_id": 256}


@pytest.fixture
def run(tmp_path):
    """A workdir of which only the config is left, with the tokenizer of bytes."""
    made = configs.resolve(dict(data=dict(source="memory", texts=("abc",), tokenizer="bytes")))
    (tmp_path / "config.json").write_text(configs.to_json(made))
    return str(tmp_path)


class Reversed:
    """Another tokenizer of as many ids."""
    vocab_size = 256

    def encode(self, text):
        return [255 - byte for byte in text.encode()]


def test_another_tokenizer_is_said(run, caplog):
    with caplog.at_level(logging.WARNING):
        assert not compare_tokenizers(run, Reversed())
    assert f"{run} was trained with another tokenizer" in caplog.text


def test_one_that_encodes_alike_is_none(run, caplog):
    assert all(compare_tokenizers(run, build_tokenizer(spec)) for spec in ("bytes", WITH_EOS))
    assert not caplog.records


def test_ids_without_text_and_runs_that_are_gone_are_not_compared(run, tmp_path):
    ids = load_tokenizer(dict(source="passkey", task=dict(blocks=(2,), block=8, num_keys=4, num_filler=4)))
    assert compare_tokenizers(run, ids) and compare_tokenizers(str(tmp_path / "none"), Reversed())
