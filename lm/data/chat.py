"""Chats to token ids, and which of them are answers: what supervised fine-tuning and preference losses count.

A token belongs to an answer where it is one that the model would have to produce after the prompt: its content and what
ends it. Ids are those that generation meets: no token reaches over the beginning or end of an answer, whatever a
tokenizer would merge there.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.core.fields import did_you_mean
from lm.data.chat_template import BEGIN, BOS, END, EOS, BadChat, Messages, Template
from lm.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
ANSWERS = ("all", "last")
# Texts whose encoding is known, put before one that must be encoded as going on: see `_continued`.
_GUARDS = ("\n", " ", ".", "a")


def render(messages: Messages, template: Template, tokenizer: Tokenizer, *, answers: str = "all", prompt: bool = False,
           allow_special: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(ids [tokens] int32, response [tokens] bool) of a chat.

    Args:
      messages: dicts of `role` (one of ROLES) and `content` (text).
      template: from `lm.data.chat_template.load_template`, with the same tokenizer.
      answers: which messages of the assistant are response: "all", or the "last" message alone.
      prompt: end with what stands before an answer; it is not response.
      allow_special: whether contents may hold the text of special tokens, which would be read as those.

    Where the template encloses answers in {% generation %}, these are the response; else an answer is what follows the
    prompt that the messages before it make, up to its end token. Raises `BadChat` (a ValueError with `reason`) for
    messages that are none, unknown roles and contents, and for what the template refuses.
    """
    if answers not in ANSWERS:
        raise ValueError(f"answers must be {' or '.join(ANSWERS)}; got {answers!r}{did_you_mean(answers, ANSWERS)}")
    check_messages(messages, {} if allow_special else getattr(tokenizer, "special_tokens", {}))
    text = template.text(messages, prompt=prompt)
    if BEGIN in text:
        text, spans = _marked(text)
        spans = spans[-1:] if answers == "last" else spans
    else:
        spans = _found(messages, template, text, last=answers == "last")
    cuts = sorted({at for span in spans for at in span})
    ids, places = encode_cut(text, cuts, tokenizer)
    place = dict(zip(cuts, places, strict=True))
    response = np.zeros(len(ids), bool)
    for begin, end in spans:
        response[place[begin]:place[end]] = True
    return ids, response


def check_messages(messages: Any, special: Mapping[str, int]) -> None:
    """Raises `BadChat` for what is no list of messages with known roles and texts free of `special` tokens."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadChat("no messages", "a chat is a list of at least one message, each with `role` and `content`")
    for number, message in enumerate(messages):
        where = f"message {number}"
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            has = f"has the fields {', '.join(map(str, message))}" if isinstance(message, Mapping) else "is no object"
            raise BadChat("no role or content", f"{where} {has}; it needs `role` and `content`")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise BadChat("unknown role", f"{where} has role {role!r}{did_you_mean(str(role), ROLES)}; known: "
                                          f"{', '.join(ROLES)}")
        if not isinstance(content, str):
            raise BadChat("content is no text", f"{where} ({role}) has content of type {type(content).__name__}; it "
                                                f"must be a string")
        found = next((text for text in (BOS, EOS, BEGIN, END, *special) if text and text in content), None)
        if found is not None:
            raise BadChat("special token in content", f"{where} ({role}) holds {found!r}, which would be read as a "
                                                      f"special token")
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadChat("no text", f"{where} ({role}) holds a lone surrogate (character {error.start}), which is no "
                                     f"text") from None


def _marked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks of {% generation %}, and what they enclosed."""
    parts = re.split(f"[{BEGIN}{END}]", text)
    ends = list(itertools.accumulate(map(len, parts)))
    return "".join(parts), list(zip(ends[0::2], ends[1::2], strict=False))


def _found(messages: Messages, template: Template, whole: str, *, last: bool) -> list[tuple[int, int]]:
    """(begin, end) of each answer in `whole`, by rendering the messages before it and up to it."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or (last and i != len(messages) - 1):
            continue
        after = template.text(messages[:i + 1])
        if not whole.startswith(after):
            raise BadChat("answers not found", f"the chat template {template.name} writes message {i} differently once "
                                               f"others follow, so that its place is not known; count only the last "
                                               f"answer, or use a template with {{% generation %}}")
        before = template.text(messages[:i], prompt=True) if i else template.text([], prompt=True)
        if after.startswith(before):
            begin = len(before)
        else:  # some add to the prompt what they leave out of a chat that is over, such as an empty thought
            before = template.text(messages[:i]) if i else ""
            content = message["content"].strip()
            begin = after.find(content, len(before)) if after.startswith(before) else -1
            if begin < 0 or not content:
                raise BadChat("answers not found", f"the chat template {template.name} does not hold the answer of "
                                                   f"message {i} as it is; use a template with {{% generation %}}")
        # What follows an end token up to the next message is no part of the answer.
        bare = after.rstrip()
        ends_itself = bool(message["content"].strip()) and bare.endswith(message["content"].rstrip())
        spans.append((begin, len(after) if ends_itself else max(len(bare), begin)))
    return spans


def encode_cut(text: str, cuts: Sequence[int], tokenizer: Tokenizer) -> tuple[np.ndarray, list[int]]:
    """(ids [tokens] int32, number of tokens before each of `cuts`), with no token on both sides of a cut.

    cuts: rising places in the text. Where the tokens before a cut are those that the text before it has by itself, the
    ids are the tokenizer's own; else the text goes on behind the cut as if newly begun. Special tokens are the ids of
    the tokenizer.
    """
    ids: list[int] = []
    places: list[int] = []
    waiting = list(cuts)
    at = 0
    for part in _parts(text, tokenizer):
        end = at + len(part) if isinstance(part, str) else at + part[0]
        inside = [waiting.pop(0) - at for _ in range(sum(cut < end for cut in waiting))]
        if isinstance(part, str):
            _encode_part(part, inside, tokenizer, ids, places)
        else:
            places += [len(ids)] * len(inside)
            ids.append(part[1])
        at = end
    places += [len(ids)] * len(waiting)
    return np.asarray(ids, np.int32), places


def _parts(text: str, tokenizer: Tokenizer) -> list[str | tuple[int, int]]:
    """The text between special tokens, and (length, id) of those that the tokenizer does not find in text itself."""
    special = {BOS: tokenizer.bos_id, EOS: tokenizer.eos_id}
    if not getattr(tokenizer, "reads_special", False):
        special |= getattr(tokenizer, "special_tokens", {})
    pattern = "|".join(re.escape(one) for one in sorted(special, key=len, reverse=True))
    return [(len(one), special[one]) if one in special else one for one in re.split(f"({pattern})", text) if one]


def _encode_part(text: str, cuts: Sequence[int], tokenizer: Tokenizer, ids: list[int], places: list[int]) -> None:
    """Appends the ids of `text`, and for each cut how many there are before it."""
    begin, first = 0, True
    encode = lambda piece: (tokenizer.encode(piece) if first else _continued(piece, tokenizer)).tolist()
    whole = encode(text)
    for cut in cuts:
        head = encode(text[begin:cut]) if cut > begin else []
        if whole[:len(head)] == head:
            places.append(len(ids) + len(head))
            continue
        # A token of the whole reaches over the cut.
        ids += head
        places.append(len(ids))
        begin, first = cut, False
        whole = encode(text[cut:])
    ids += whole


def _continued(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Ids of a text that goes on from another: without the space that some tokenizers put before every text."""
    plain, before = tokenizer.encode(text), tokenizer.encode("a")
    if tokenizer.decode(np.concatenate([before, plain])) == tokenizer.decode(tokenizer.encode("a" + text)):
        return plain
    for guard in _GUARDS:
        known, both = tokenizer.encode(guard), tokenizer.encode(guard + text)
        if len(known) and both[:len(known)].tolist() == known.tolist():
            return both[len(known):]
    raise BadChat("tokens merge", f"the tokenizer merges {text[:20]!r} with whatever stands before it, so that an "
                                  f"answer cannot begin there; use a chat template with special tokens")
