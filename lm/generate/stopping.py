"""Tokens of one row as they arrive: to text, to where it stops, and to what may be shown already."""

from collections.abc import Callable, Collection, Sequence

import numpy as np

from lm.generate.result import FinishReason, Generation

Decode = Callable[[Sequence[int]], str]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders give for bytes that are not (yet) a character
CONTEXT = 8  # tokens of the prompt that are decoded with the first new one


class Detokenizer:
    """Text of tokens that arrive one by one.

    A token's text depends on its neighbours: a character may be spread over several tokens, and decoders drop a space
    at the start. So a few tokens before the new ones are decoded with them and without them, and the difference is what
    the new ones say; it waits while it ends inside a character. Each token is decoded a bounded number of times.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int]):
        self._decode = decode
        self._ids = [int(token) for token in prompt[-CONTEXT:]]
        self._start, self._read = 0, len(self._ids)  # context begins; tokens whose text has been given out

    def add(self, token: int) -> str:
        """The text that became certain with this token, often empty."""
        self._ids.append(int(token))
        before, now = self._decode(self._ids[self._start:self._read]), self._decode(self._ids[self._start:])
        if len(now) <= len(before) or now.endswith(REPLACEMENT):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before):]

    def rest(self) -> str:
        """What is still waiting, such as half a character."""
        before, now = self._decode(self._ids[self._start:self._read]), self._decode(self._ids[self._start:])
        self._start = self._read = len(self._ids)
        return now[len(before):]


class Row:
    """The new tokens of one prompt. Stops at the first token in `stop_tokens` or at the first that completes one of
    `stop_strings` in the text, however the string is spread over tokens."""

    def __init__(self, prompt: Sequence[int], decode: Decode | None, stop_tokens: Collection[int],
                 stop_strings: Sequence[str]):
        self.tokens: list[int] = []
        self.reason: FinishReason | None = None
        self._text = ""
        self._shown = 0
        self._detokenizer = None if decode is None else Detokenizer(decode, prompt)
        self._stop_tokens, self._stop_strings = frozenset(stop_tokens), tuple(stop_strings)

    def add(self, token: int) -> None:
        """Takes the next token; does nothing once the row has stopped."""
        if self.reason is not None:
            return
        self.tokens.append(int(token))
        if token in self._stop_tokens:
            self.finish("eos")
        elif self._detokenizer is not None:
            self._extend(self._detokenizer.add(token))

    def finish(self, reason: FinishReason) -> None:
        """Ends the row; text that waited for its last bytes is given out as it is."""
        if self.reason is not None:
            return
        if self._detokenizer is not None:
            self._extend(self._detokenizer.rest())
        self.reason = self.reason or reason

    def piece(self) -> str:
        """The text since the last call that no stop string can take back any more."""
        end = len(self._text) - (0 if self.reason is not None else held_back(self._text, self._stop_strings))
        out = self._text[self._shown:end]
        self._shown = max(self._shown, end)
        return out

    def result(self) -> Generation:
        """The finished row."""
        text = None if self._detokenizer is None else self._text
        return Generation(np.asarray(self.tokens, np.int32), text, self.reason or "length")

    def _extend(self, piece: str) -> None:
        longest = max((len(stop) for stop in self._stop_strings), default=0)
        start = max(0, len(self._text) - longest + 1)  # a stop string that ends in the new piece begins no earlier
        self._text += piece
        found = [n for stop in self._stop_strings if (n := self._text.find(stop, start)) >= 0]
        if found:
            self._text, self.reason = self._text[:min(found)], "stop"


def held_back(text: str, stop_strings: Sequence[str]) -> int:
    """Length of the longest end of `text` with which a stop string begins."""
    longest = 0
    for stop in stop_strings:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
