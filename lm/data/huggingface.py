"""Tokenizers of the `tokenizers` package: one JSON file."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.data.files import one_file, read_text
from lm.data.hashing import digest


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """`tokenizer.json`. `bos` and `eos` are special tokens by text ("<|endoftext|>") or id."""

    path: str
    package: str | None = None
    bos: str | int | None = None
    eos: str | int | None = None

    @functools.cached_property
    def file(self) -> Any:
        return one_file(self.path, self.package)

    @functools.cached_property
    def _text(self) -> str:
        return read_text(self.file)

    @functools.cached_property
    def _model(self) -> Any:
        try:
            import tokenizers
        except ImportError:
            raise ValueError("tokenizer kind 'tokenizers' needs that package; pip install 'loomlm[data]'") from None
        try:
            model = tokenizers.Tokenizer.from_str(self._text)
        except Exception as error:  # the package raises plain Exception
            raise ValueError(f"{self.file} is not a JSON file of the tokenizers package ({error})") from None
        model.no_padding()
        model.no_truncation()
        return model

    def _special(self, given: str | int | None, name: str) -> int | None:
        if not isinstance(given, str):
            return given
        found = self._model.token_to_id(given)
        if found is None:
            raise ValueError(f"{self.file} has no token {given!r} for {name}; its special tokens are "
                             f"{', '.join(self._specials.values()) or 'none'}")
        return found

    @functools.cached_property
    def _specials(self) -> dict[int, str]:
        return {i: str(t.content) for i, t in self._model.get_added_tokens_decoder().items() if t.special}

    reads_special = True  # `encode` turns the texts of special tokens into their ids

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """Text to id of the special tokens."""
        return {text: i for i, text in self._specials.items()}

    @functools.cached_property
    def bos_id(self) -> int | None:
        return self._special(self.bos, "bos")

    @functools.cached_property
    def eos_id(self) -> int | None:
        return self._special(self.eos, "eos")

    @functools.cached_property
    def _vocab(self) -> dict[str, int]:
        return self._model.get_vocab(with_added_tokens=True)

    @functools.cached_property
    def vocab_size(self) -> int:
        return 1 + max(self._vocab.values(), default=-1)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        # In byte-level vocabularies each character stands for one byte. In the others a leading mark stands for a
        # space or for nothing, and what normalisation dropped is not known: the data set rescales.
        kinds = json.dumps([json.loads(self._text).get(k) for k in ("decoder", "pre_tokenizer")])
        added = self._model.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, i in self._vocab.items():
            if i in added:
                sizes[i] = 0 if added[i].special else len(token.encode())
            elif '"ByteLevel"' in kinds:
                sizes[i] = len(token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                sizes[i] = 1
            else:
                sizes[i] = len(token.removeprefix("##").replace("\u2581", " ").encode())
        return sizes

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest("tokenizers", self._text, self.bos_id, self.eos_id)

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._model.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in found]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)
