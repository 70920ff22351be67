"""A run as a model of lm-evaluation-harness: its tasks in this process, without a server or a copy of the weights.

Needs the package lm-eval (extra `harness`).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM

from lm.core.types import Apply, Params, State
from lm.data.tokenizer import Tokenizer
from lm.eval.documents import target_scores
from lm.eval.samples import encode_prompt, stop_tokens
from lm.generate.decode import generate
from lm.generate.sampling import SamplingOptions

log = logging.getLogger(__name__)

NEW_TOKENS = 256     # of an answer, where a task names no number; the harness' own default


class HarnessModel(LM):
    """Answers the three kinds of requests of lm-evaluation-harness.

    apply, params, initial_state: the model, see `lm.generate.decode.generate`. add_bos: whether its documents begin
    with bos. max_length: tokens that it takes at a time, None for any number; a longer context loses its beginning.
    batch_size: texts at a time; no answer depends on it.
    """

    def __init__(self, apply: Apply, params: Params, initial_state: Callable[..., State], tokenizer: Tokenizer, *,
                 add_bos: bool = False, max_length: int | None = None, batch_size: int = 16):
        super().__init__()
        self._apply, self._params, self._initial_state = apply, params, initial_state
        self._tokenizer, self._add_bos = tokenizer, add_bos
        self._max_length, self._batch_size = max_length, batch_size
        self._cut = 0

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether greedy decoding would write it) of each (context, continuation)."""
        pairs = [self._pair(*request.args) for request in requests]
        documents = [self._fit_after(*pair) for pair in pairs]
        scored = target_scores(self._apply, self._params, documents, self._batch_size)
        self._report_cut()
        return [(-float(s.nats[-len(more):].sum()), bool(s.best[-len(more):].all())) if len(more) else (0.0, True)
                for s, (_, more) in zip(scored, pairs, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text. Its first token is scored after bos, or after eos where there is no bos; without
        either it is not scored. A text longer than the model takes is scored in windows that overlap in one token."""
        windows, owner = [], []
        for n, request in enumerate(requests):
            text, = request.args
            ids = np.concatenate([self._beginning(), np.asarray(self._tokenizer.encode(text), np.int32)])
            step = len(ids) if self._max_length is None else self._max_length - 1
            for start in range(0, max(len(ids) - 1, 0), max(step, 1)):
                windows.append(ids[start:start + step + 1])
                owner.append(n)
        totals = [0.0] * len(requests)
        for n, scored in zip(owner, target_scores(self._apply, self._params, windows, self._batch_size), strict=True):
            totals[n] -= float(scored.nats.sum())
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context until one of the texts of `until`, or eos."""
        answers: dict[int, str] = {}
        for settings, numbers in self._alike(requests):
            options, until, new_tokens = settings
            for start in range(0, len(numbers), self._batch_size):
                part = numbers[start:start + self._batch_size]
                prompts = [self._fit(self._context(requests[n].args[0]), new_tokens) for n in part]
                made = generate(self._apply, self._params, self._initial_state, prompts, max_new_tokens=new_tokens,
                                options=options, rows=part, stop_tokens=stop_tokens(self._tokenizer),
                                stop_strings=until, decode=self._tokenizer.decode, capacity=self._max_length)
                answers |= {n: row.text for n, row in zip(part, made.rows, strict=True)}
        self._report_cut()
        return [answers[n] for n in range(len(requests))]

    @staticmethod
    def _alike(requests: Sequence[Any]) -> Iterator[tuple[tuple[SamplingOptions, tuple[str, ...], int], list[int]]]:
        """Requests with the same settings, by number."""
        groups: dict[Any, list[int]] = {}
        for n, request in enumerate(requests):
            given = dict(request.args[1])
            until = given.pop("until", None) or ()
            until = (until,) if isinstance(until, str) else tuple(until)
            new_tokens = int(given.pop("max_gen_toks", NEW_TOKENS))
            drawn = given.pop("do_sample", None)
            options = {name: given.pop(name) for name in ("temperature", "top_k", "top_p", "min_p") if name in given}
            if drawn is False or (drawn is None and "temperature" not in options):
                options = {"temperature": 0.0}
            if given:
                raise ValueError(f"a task asks for generation settings that are not known here: {sorted(given)}; "
                                 f"known: until, max_gen_toks, do_sample, temperature, top_k, top_p, min_p")
            groups.setdefault((SamplingOptions(**options), until, new_tokens), []).append(n)
        yield from groups.items()

    def _pair(self, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of both parts of the text that they make together; white space between them is the continuation's. Where
        a token spans both, it is the context's, but the last token always is the continuation's."""
        kept = context.rstrip()
        context, continuation = kept, context[len(kept):] + continuation
        whole = np.asarray(self._tokenizer.encode(context + continuation), np.int32)
        size = min(len(self._tokenizer.encode(context)) if context else 0, len(whole) - bool(continuation))
        before = np.concatenate([self._bos(), whole[:size]]) if size else self._beginning()
        if continuation and not before.size:
            raise ValueError(f"the continuation {continuation!r} stands after nothing (context {context!r}), and "
                             f"the tokenizer has neither bos nor eos to stand there; give the task a context "
                             f"(doc_to_text)")
        return before, whole[size:]

    def _context(self, text: str) -> np.ndarray:
        return encode_prompt(self._tokenizer, text, add_bos=self._add_bos)

    def _bos(self) -> np.ndarray:
        """[0 or 1] ids that every document of the run begins with."""
        given = self._tokenizer.bos_id if self._add_bos else None
        return np.array([] if given is None else [given], np.int32)

    def _beginning(self) -> np.ndarray:
        """[0 or 1] ids after which a text may begin."""
        ends = (self._tokenizer.bos_id, self._tokenizer.eos_id)
        return np.array([i for i in ends if i is not None][:1], np.int32)

    def _fit_after(self, before: np.ndarray, more: np.ndarray) -> np.ndarray:
        """Both, with as much of the context as the model takes. Raises ValueError where the continuation is too long
        to stand after anything."""
        if self._max_length is not None and len(more) >= self._max_length:
            raise ValueError(f"a continuation has {len(more)} tokens, and the model takes {self._max_length} with what "
                             f"stands before it; leave that task out")
        return self._fit(np.concatenate([before, more]), 0)

    def _fit(self, ids: np.ndarray, new_tokens: int) -> np.ndarray:
        """The end of a text, so that with so many more tokens it is no longer than the model takes."""
        if self._max_length is None or len(ids) + new_tokens <= self._max_length:
            return ids
        if new_tokens >= self._max_length:
            raise ValueError(f"a task asks for {new_tokens} new tokens; the model takes {self._max_length} in all; "
                             f"lower max_gen_toks of the task")
        self._cut += 1
        return ids[len(ids) + new_tokens - self._max_length:]

    def _report_cut(self) -> None:
        if self._cut:
            log.warning("%d contexts were longer than the %d tokens that the model takes and lost their beginning",
                        self._cut, self._max_length)
        self._cut = 0
