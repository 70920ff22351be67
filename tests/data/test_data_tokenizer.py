"""Tokenizers: round trips, exact bytes, published ids, and clear errors."""

import ast
import base64
import pickle
import random
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data.tokenizer import build_tokenizer, tokenizer_spec

TEXTS = ("Hello world, hello again.\n", "naïve café 世界 🎉\r\n\tx = 1;", "aaaaaaaaaa the the the", " lead", "tail ")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small vocabulary of every kind, trained or written here."""
    folder = tmp_path_factory.mktemp("tokenizers")
    specs = {"bytes": {"kind": "bytes"}}
    words = [b"the", b" the", b"hello", b"ell", b"\xe4\xb8", "世界".encode(), b"aa", b"aaaa", b"  ", b" hel"]
    ranks = [bytes([b]) for b in range(256)] + [b"th", b"the", b"ll", b"he", b"aa"]
    (folder / "small.tiktoken").write_bytes(
        b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(ranks)))
    specs["tiktoken"] = {"kind": "tiktoken", "path": str(folder / "small.tiktoken")}
    tokens = [bytes([b]) for b in range(256)] + words
    lines = []
    for i, token in enumerate(tokens, 1):
        try:
            literal = repr(token.decode("utf-8"))
        except UnicodeDecodeError:
            literal = repr(token)
        lines.append(f"{i} {literal} {len(token)}\r\n")
    (folder / "world.txt").write_text("".join(lines), encoding="utf-8", newline="")
    specs["rwkv_world"] = {"kind": "rwkv_world", "path": str(folder / "world.txt")}
    import tokenizers
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    specs["tokenizers"] = {"kind": "tokenizers", "path": str(folder / "tokenizer.json"), "eos": "<|end|>"}
    return {kind: build_tokenizer(spec) for kind, spec in specs.items()}


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    import sentencepiece
    path = tmp_path_factory.mktemp("sp") / "m"
    rows = ["the cat sat on the mat", "a dog and a cat", "hello world hello"] * 20
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(rows), model_prefix=str(path), vocab_size=300,
                                             byte_fallback=True, minloglevel=2, hard_vocab_limit=False)
    return build_tokenizer({"kind": "sentencepiece", "path": f"{path}.model"})


@pytest.mark.parametrize("kind", ["bytes", "tiktoken", "rwkv_world", "tokenizers"])
def test_text_survives_and_token_bytes_add_up(made, kind):
    tokenizer = made[kind]
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert tokenizer.encode(text).dtype == np.int32
        np.testing.assert_array_equal(tokenizer.encode(text), ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    if tokenizer.eos_id is not None:
        assert tokenizer.token_bytes[tokenizer.eos_id] == 0
        assert tokenizer.decode([tokenizer.eos_id]) == ""


@pytest.mark.parametrize("kind", ["bytes", "tiktoken", "rwkv_world", "tokenizers"])
def test_the_spec_builds_the_same_tokenizer_again(made, kind):
    again = build_tokenizer(tokenizer_spec(made[kind]))
    assert again.fingerprint == made[kind].fingerprint and again.vocab_size == made[kind].vocab_size
    assert len({t.fingerprint for t in made.values()}) == len(made)
    assert pickle.loads(pickle.dumps(again)).fingerprint == again.fingerprint


@given(st.text())
def test_bytes_are_utf8(text):
    tokenizer = build_tokenizer("bytes")
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_byte_ids_extend_the_vocabulary_only_beyond_255():
    assert build_tokenizer({"kind": "bytes", "eos_id": 0}).vocab_size == 256
    both = build_tokenizer({"kind": "bytes", "bos_id": 256, "eos_id": 257})
    assert both.vocab_size == 258 and both.decode([256, 104, 105, 257]) == "hi"
    assert both.fingerprint != build_tokenizer("bytes").fingerprint


def test_rwkv_world_takes_the_longest_match_at_each_byte(made):
    tokenizer = made["rwkv_world"]
    with open(tokenizer.path, encoding="utf-8", newline="") as file:
        table = {}
        for line in file:
            literal = ast.literal_eval(line[line.index(" "):line.rindex(" ")].strip())
            table[literal.encode() if isinstance(literal, str) else literal] = int(line.split(" ")[0])
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice(["a", "the", " ", "hel", "l", "o", "世", "界", "世界", "é"]) for _ in range(20))
        data, want = text.encode(), []
        while data:
            best = max((t for t in table if data.startswith(t)), key=len)
            want.append(table[best])
            data = data[len(best):]
        assert tokenizer.encode(text).tolist() == want


def test_sentencepiece_round_trip_and_specials(sentencepiece_model):
    tokenizer = sentencepiece_model
    for text in ("hello cat", "the dog 世"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        # The library puts a space in front, which the text does not have.
        assert tokenizer.token_bytes[ids].sum() == len(text.encode()) + 1
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert build_tokenizer(tokenizer_spec(tokenizer)).fingerprint == tokenizer.fingerprint


def test_bytes_are_rescaled_where_a_tokenizer_adds_some(sentencepiece_model):
    from lm.data.loader import build_dataset
    texts = ("hello cat", "the dog 世", "a cat sat")
    data = build_dataset({"source": "memory", "texts": texts, "validation_fraction": 0, "add_bos": True},
                         tokenizer=sentencepiece_model, batch_size=1, seq_len=8)
    total = sum(data.token_bytes[targets].sum() for _, targets in data.target_blocks())
    assert total == pytest.approx(sum(len(t.encode()) for t in texts), rel=1e-12)


@pytest.mark.parametrize(("spec", "message"), [
    ("byte", "no kind 'byte'; did you mean 'bytes'"),
    ({"path": "x"}, "needs kind"),
    ({"kind": "tiktoken"}, "needs path"),
    ({"kind": "bytes", "eos": 3}, "no field 'eos'; did you mean 'eos_id'"),
    ({"kind": "bytes", "eos_id": 300}, "eos_id must be 0 to 255"),
    ({"kind": "rwkv_world", "path": "/no/such/file"}, "no file or folder"),
])
def test_bad_specs_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        build_tokenizer(spec)


@pytest.mark.parametrize(("kind", "message"), [
    ("tiktoken", r"vocab.txt:1 is not a tiktoken line"),
    ("rwkv_world", r"vocab.txt:1 is not a line 'id literal length'"),
    ("tokenizers", "vocab.txt is not a JSON file of the tokenizers package"),
    ("sentencepiece", "vocab.txt is not a SentencePiece model"),
])
def test_files_of_another_format_are_refused(tmp_path, kind, message):
    (tmp_path / "vocab.txt").write_text("this is no vocabulary\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        build_tokenizer({"kind": kind, "path": str(tmp_path / "vocab.txt")})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "package"), [("tokenizers", "tokenizers"), ("sentencepiece", "sentencepiece"),
                                               ("tiktoken", "tiktoken")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, kind, package):
    (tmp_path / "vocab").write_text("YQ== 0\n", encoding="utf-8")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"pip install 'loomlm\[data\]'"):
        build_tokenizer({"kind": kind, "path": str(tmp_path / "vocab")})


def test_an_unknown_special_token_lists_the_known_ones(made):
    with pytest.raises(ValueError, match=r"no token '<eos>' for eos; its special tokens are <\|end\|>"):
        build_tokenizer({**tokenizer_spec(made["tokenizers"]), "eos": "<eos>"})
