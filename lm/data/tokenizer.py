"""Tokenizers behind one protocol, built from a plain dict.

To add one: a frozen dataclass with the fields and methods of `Tokenizer` and one row in `_KINDS`.
"""

import dataclasses
import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from lm.core.fields import build, check_known
from lm.data.hashing import digest


class Tokenizer(Protocol):
    """Text to token ids and back.

    vocab_size: ids are below it. bos_id, eos_id: None where there is none.
    token_bytes: [vocab_size] int32, UTF-8 bytes of text that each id stands for, 0 for special ids: what bits per byte
      divides by. For tokenizers that normalise text the sum over a document can differ from its length in bytes; the
      data set then rescales it (see `TokenDataset.token_bytes`).
    fingerprint: changes when any id of any text may change.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    token_bytes: np.ndarray
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """[tokens] int32, without bos and eos."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in parallel where the library can."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids; special ids give nothing and broken UTF-8 gives U+FFFD."""


@dataclasses.dataclass(frozen=True)
class Bytes:
    """UTF-8 bytes, 256 ids. `eos_id=0` uses NUL, which text does not contain, and keeps the 256; `eos_id=256` is an id
    of its own and makes the vocabulary 257."""

    bos_id: int | None = None
    eos_id: int | None = None

    def check(self) -> None:
        """Raises ValueError for special ids out of reach."""
        for name in ("bos_id", "eos_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 257:
                raise ValueError(f"tokenizer bytes: {name} must be 0 to 255 (a byte that the text does not use, such "
                                 f"as 0) or 256 or 257 (an id of its own); got {value}")

    @property
    def vocab_size(self) -> int:
        return max(256, *(1 + i for i in (self.bos_id, self.eos_id) if i is not None), 0)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        sizes = np.ones(self.vocab_size, np.int32)
        sizes[[i for i in (self.bos_id, self.eos_id) if i is not None]] = 0
        return sizes

    @property
    def fingerprint(self) -> str:
        return digest("bytes", self.bos_id, self.eos_id)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64)
        return ids[self.token_bytes[ids] > 0].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


_KINDS = {"bytes": "lm.data.tokenizer:Bytes", "tokenizers": "lm.data.huggingface:HuggingFace",
          "sentencepiece": "lm.data.piece:SentencePiece", "tiktoken": "lm.data.ranks:Tiktoken",
          "rwkv_world": "lm.data.rwkv_world:RwkvWorld", "ids": "lm.data.synthetic.ids:Ids"}


def build_tokenizer(spec: str | Mapping[str, Any] | None, where: str = "config.data.tokenizer") -> Tokenizer:
    """A tokenizer from its kind or from `dict(kind=..., path=..., ...)`; None is bytes.

    Raises ValueError for an unknown kind or field, a file that is absent or of another format, or a missing package.
    """
    given = {"kind": spec or "bytes"} if spec is None or isinstance(spec, str) else dict(spec)
    if "kind" not in given:
        raise ValueError(f"{where} needs kind: one of {', '.join(_KINDS)}")
    kind = given.pop("kind")
    check_known([kind], _KINDS, where, "kind")
    module, name = _KINDS[kind].split(":")
    tokenizer = build(getattr(importlib.import_module(module), name), given, where)
    # Reading the file here makes every mistake in it appear at the start.
    if tokenizer.vocab_size < 1:
        raise ValueError(f"{where}: the vocabulary is empty")
    for special in ("bos_id", "eos_id"):
        value = getattr(tokenizer, special)
        if value is not None and not 0 <= value < tokenizer.vocab_size:
            raise ValueError(f"{where}: {special}={value} is outside the vocabulary of {tokenizer.vocab_size}")
    return tokenizer


def tokenizer_spec(tokenizer: Tokenizer) -> dict[str, Any]:
    """The dict that builds the same tokenizer, with the defaults left out."""
    kind = next(kind for kind, place in _KINDS.items() if place.endswith(":" + type(tokenizer).__name__))
    given = {f.name: getattr(tokenizer, f.name) for f in dataclasses.fields(tokenizer)
             if f.default is dataclasses.MISSING or getattr(tokenizer, f.name) != f.default}
    return {"kind": kind, **given}


def special_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that stand for no text: bos, eos, and others of 0 bytes."""
    named = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    return tuple(sorted({*named, *np.flatnonzero(tokenizer.token_bytes == 0).tolist()}))
