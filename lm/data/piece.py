"""SentencePiece models: one protobuf file."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.data.files import one_file
from lm.data.hashing import digest


@dataclasses.dataclass(frozen=True)
class SentencePiece:
    """A `.model` file; bos and eos are the model's own where it has them."""

    path: str
    package: str | None = None

    @functools.cached_property
    def file(self) -> Any:
        return one_file(self.path, self.package)

    @functools.cached_property
    def _proto(self) -> bytes:
        return self.file.read_bytes()

    @functools.cached_property
    def _model(self) -> Any:
        try:
            import sentencepiece
        except ImportError:
            raise ValueError("tokenizer kind 'sentencepiece' needs that package; pip install 'loomlm[data]'") from None
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self._proto)
        except (RuntimeError, OSError, ValueError):
            raise ValueError(f"{self.file} is not a SentencePiece model") from None

    @functools.cached_property
    def vocab_size(self) -> int:
        return self._model.get_piece_size()

    @property
    def bos_id(self) -> int | None:
        return self._model.bos_id() if self._model.bos_id() >= 0 else None

    @property
    def eos_id(self) -> int | None:
        return self._model.eos_id() if self._model.eos_id() >= 0 else None

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        model = self._model
        sizes = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if model.is_byte(i):
                sizes[i] = 1
            elif not (model.is_control(i) or model.is_unknown(i)):
                sizes[i] = len(model.id_to_piece(i).replace("\u2581", " ").encode())
        return sizes

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest("sentencepiece", self._proto)

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._model.encode(text), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(ids, np.int32) for ids in self._model.encode(list(texts))]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode([int(i) for i in ids])
