"""The RWKV World tokenizer: at each byte the longest token that matches (file `rwkv_vocab_v20230424.txt`).

A line of the file is `id literal length`, the literal a Python str or bytes. Id 0 is not in the file; it ends a text.
"""

import ast
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.data.files import one_file, read_lines
from lm.data.hashing import digest


@dataclasses.dataclass(frozen=True)
class RwkvWorld:
    """The vocabulary file, such as `dict(package="rwkv", path="rwkv_vocab_v20230424.txt")`. `vocab_size` is one more
    than the largest id (65530); published World models pad their tables to 65536."""

    path: str
    package: str | None = None

    @functools.cached_property
    def file(self) -> Any:
        return one_file(self.path, self.package)

    @functools.cached_property
    def _ids(self) -> dict[bytes, int]:
        ids = {}
        for number, line in read_lines(self.file):
            if not line.strip():
                continue
            try:
                first, last = line.index(" "), line.rindex(" ")
                token = ast.literal_eval(line[first:last].strip())
                token = token.encode("utf-8") if isinstance(token, str) else token
                if len(token) != int(line[last:]) or int(line[:first]) < 1 or not isinstance(token, bytes):
                    raise ValueError
                ids[token] = int(line[:first])
            except (ValueError, SyntaxError):
                raise ValueError(f"{self.file}:{number} is not a line 'id literal length' of an RWKV World vocabulary: "
                                 f"{line[:60].rstrip()!r}") from None
        missing = [b for b in range(256) if bytes([b]) not in ids]
        if missing:
            raise ValueError(f"{self.file} has no token for byte {missing[0]}; every single byte needs one")
        return ids

    @functools.cached_property
    def _sizes(self) -> dict[bytes, tuple[int, ...]]:
        """First two bytes -> the lengths, the longest first, that tokens beginning so have: a trie folded flat."""
        sizes: dict[bytes, set[int]] = {}
        for token in self._ids:
            if len(token) > 1:
                sizes.setdefault(token[:2], set()).add(len(token))
        return {start: tuple(sorted(found, reverse=True)) for start, found in sizes.items()}

    @functools.cached_property
    def _tokens(self) -> dict[int, bytes]:
        return {i: token for token, i in self._ids.items()}

    @functools.cached_property
    def vocab_size(self) -> int:
        return 1 + max(self._tokens)

    @property
    def bos_id(self) -> int:
        return 0

    @property
    def eos_id(self) -> int:
        return 0

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, np.int32)
        for i, token in self._tokens.items():
            sizes[i] = len(token)
        return sizes

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest("rwkv_world", [(i, self._tokens[i].hex()) for i in sorted(self._tokens)])

    def encode(self, text: str) -> np.ndarray:
        data, ids, sizes = text.encode("utf-8"), self._ids, self._sizes
        out, at, end = [], 0, len(data)
        while at < end:
            for size in sizes.get(data[at:at + 2], ()):
                # A slice at the end of the text is shorter than `size`; as a token it is then the right one anyway.
                token = ids.get(data[at:at + size])
                if token is not None:
                    at += min(size, end - at)
                    break
            else:
                token = ids[data[at:at + 1]]
                at += 1
            out.append(token)
        return np.asarray(out, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return b"".join(self._tokens.get(int(i), b"") for i in ids).decode("utf-8", errors="replace")
