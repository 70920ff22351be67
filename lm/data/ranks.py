"""tiktoken vocabularies: a file of base64 tokens with their ranks, and the pattern that divides text into words."""

import base64
import binascii
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.data.files import one_file, read_lines
from lm.data.hashing import digest

# The word patterns published with the vocabularies (the possessive forms change speed, not matches).
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"""
              r"""\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
}


@dataclasses.dataclass(frozen=True)
class Tiktoken:
    """A `.tiktoken` file. `pattern` is gpt2, cl100k or a regular expression; `special` maps texts to ids, by default
    `<|endoftext|>` to the first free id. bos and eos are `<|endoftext|>`."""

    path: str
    package: str | None = None
    pattern: str = "gpt2"
    special: dict[str, int] | None = None

    @functools.cached_property
    def file(self) -> Any:
        return one_file(self.path, self.package)

    @functools.cached_property
    def _ranks(self) -> dict[bytes, int]:
        ranks = {}
        for number, line in read_lines(self.file):
            if line.strip():
                try:
                    token, rank = line.split()
                    ranks[base64.b64decode(token, validate=True)] = int(rank)
                except (ValueError, binascii.Error):
                    raise ValueError(f"{self.file}:{number} is not a tiktoken line 'base64 rank': "
                                     f"{line[:60].rstrip()!r}") from None
        return ranks

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """Text to id of the special tokens; `encode` takes their texts for plain ones."""
        return {"<|endoftext|>": 1 + max(self._ranks.values())} if self.special is None else dict(self.special)

    @functools.cached_property
    def _model(self) -> Any:
        try:
            import tiktoken
        except ImportError:
            raise ValueError("tokenizer kind 'tiktoken' needs that package; pip install 'loomlm[data]'") from None
        try:
            return tiktoken.Encoding(self.file.name, pat_str=PATTERNS.get(self.pattern, self.pattern),
                                     mergeable_ranks=self._ranks, special_tokens=self.special_tokens)
        except ValueError as error:
            raise ValueError(f"{self.file}: pattern must be {', '.join(PATTERNS)} or a regular expression; got "
                             f"{self.pattern!r} ({error})") from None

    @functools.cached_property
    def vocab_size(self) -> int:
        return 1 + self._model.max_token_value

    @property
    def eos_id(self) -> int | None:
        return self.special_tokens.get("<|endoftext|>")

    @property
    def bos_id(self) -> int | None:
        return self.eos_id

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, rank in self._ranks.items():
            sizes[rank] = len(token)
        return sizes

    @functools.cached_property
    def fingerprint(self) -> str:
        ranks = sorted((rank, token.hex()) for token, rank in self._ranks.items())
        return digest("tiktoken", PATTERNS.get(self.pattern, self.pattern), self.special_tokens, ranks)

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._model.encode_ordinary(text), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64)
        return self._model.decode(ids[self.token_bytes[ids] > 0].tolist(), errors="replace")
