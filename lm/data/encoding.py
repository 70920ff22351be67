"""Texts to token ids, in order, with what later steps need to know of each document."""

import concurrent.futures
import hashlib
import logging
import multiprocessing
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lm.data.tokenizer import Tokenizer, build_tokenizer, tokenizer_spec

log = logging.getLogger(__name__)

_BLOCK_CHARS = 1 << 20
_SLOW_SECONDS = 5.0


class Encoded(NamedTuple):
    """One document: token ids without bos and eos, length in UTF-8 bytes, and a 64-bit hash of the text; of a chat also
    which tokens are to be learned, bool, and the number of its group."""

    ids: np.ndarray
    num_bytes: int
    content: int
    response: np.ndarray | None = None
    group: int = 0


def content_hash(data: bytes) -> int:
    """The 64-bit hash that decides the side of a document."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    block, size = [], 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= _BLOCK_CHARS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _encode_block(tokenizer: Tokenizer, texts: list[str]) -> list[Encoded]:
    out = []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        data = text.encode("utf-8")
        out.append(Encoded(ids, len(data), content_hash(data)))
    return out


_worker_tokenizer: Tokenizer  # one in each worker process, set when it starts


def _start_worker(spec: dict[str, Any]) -> None:
    global _worker_tokenizer
    _worker_tokenizer = build_tokenizer(spec)


def _work(texts: list[str]) -> list[Encoded]:
    return _encode_block(_worker_tokenizer, texts)


def _encoded_blocks(texts: Iterable[str], tokenizer: Tokenizer, workers: int) -> Iterator[list[Encoded]]:
    if workers == 0:
        for block in _blocks(texts):
            yield _encode_block(tokenizer, block)
        return
    # spawn: forking a process that has started threads (JAX, grain, tokenizers) can deadlock.
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker,
                                                (tokenizer_spec(tokenizer),)) as pool:
        waiting: deque[concurrent.futures.Future] = deque()
        for block in _blocks(texts):
            waiting.append(pool.submit(_work, block))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def encode_documents(texts: Iterable[str], tokenizer: Tokenizer, *, workers: int = 0,
                     advice: str = "") -> Iterator[Encoded]:
    """Every text encoded, in the order given whatever `workers` (processes; 0 encodes in this one).

    Work that takes long logs its progress, and `advice` once.
    """
    begin = last = time.monotonic()
    documents = tokens = size = 0
    for block in _encoded_blocks(texts, tokenizer, workers):
        for one in block:
            documents, tokens, size = documents + 1, tokens + len(one.ids), size + one.num_bytes
            yield one
        now = time.monotonic()
        if now - last > _SLOW_SECONDS:
            log.info("tokenizing: %d documents, %.1f MB, %d tokens, %.1f MB/s", documents, size / 1e6, tokens,
                     size / 1e6 / (now - begin))
            if advice and last == begin:
                log.info("%s", advice)
            last = now
