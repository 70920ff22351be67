"""From a record of a file to a chat that is ready to train on: its messages and their ids, cut where it is too long."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.core.fields import check_known, option
from lm.data.chat import ANSWERS, render
from lm.data.chat_template import BadChat, Template
from lm.data.tokenizer import Tokenizer

TOO_LONG = ("skip", "start", "end", "turns")
BAD_ROWS = ("skip", "refuse")
# Where messages or a pair of texts are looked for when no field is named.
MESSAGES = ("messages", "conversations", "conversation")
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("instruction", "output"))
# Names of roles that other formats have.
ROLE_NAMES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """How records become chats."""

    template: str | None = option(None, "chat template: a built-in name (chatml, plain, text), the path of a Jinja "
                                        "file, or the template; None is what lies beside the tokenizer")
    messages_field: str | None = option(None, "field with the list of messages; None looks for "
                                              f"{', '.join(MESSAGES)}, then for a prompt and its answer")
    prompt_field: str | None = option(None, "field with the prompt (text or messages), together with answer_field")
    answer_field: str | None = option(None, "field with the answer (text or messages)")
    system: str | None = option(None, "text of a system message for chats that have none")
    answers: str = option("all", "answers to learn: all of a chat, or the last")
    max_tokens: int | None = option(None, "longest chat; None does not limit")
    too_long: str = option("skip", "a longer chat: skip counts it as bad, start cuts tokens off its start, end off its "
                                   "end, turns leaves out its oldest messages after the system's")
    bad_rows: str = option("skip", "a row that cannot be used: skip counts and reports it, refuse stops there")
    group_by: str | None = option(None, "divides chats into groups to mix: field:NAME by the value of a field (such as "
                                        "the teacher), length:N into long (answers of at least N tokens) and short")

    def check(self) -> None:
        """Raises ValueError for unknown choices."""
        check_known([self.answers], ANSWERS, "answers", "choice")
        check_known([self.too_long], TOO_LONG, "too_long", "choice")
        check_known([self.bad_rows], BAD_ROWS, "bad_rows", "choice")
        if (self.prompt_field is None) != (self.answer_field is None):
            raise ValueError("prompt_field and answer_field belong together; give both, or neither")
        if self.prompt_field is not None and self.messages_field is not None:
            raise ValueError("a chat is in messages_field, or in prompt_field and answer_field; give one of these")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2; got {self.max_tokens}")
        if self.group_by is not None and not re.fullmatch(r"field:.+|length:[1-9]\d*", self.group_by):
            raise ValueError(f"group_by must be field:NAME or length:N; got {self.group_by!r}")


class Chat(NamedTuple):
    """ids, response: see `lm.data.chat.render`. prompt: text before the first answer, which decides the side of the
    split. group: name, "" without groups. cut: whether something was left out for length."""

    ids: np.ndarray
    response: np.ndarray
    prompt: str
    group: str
    cut: bool


def chat_of(record: Mapping[str, Any], options: ChatOptions, template: Template, tokenizer: Tokenizer) -> Chat:
    """The chat of a record. Raises `BadChat` for one that cannot be used."""
    messages = messages_of(record, options)
    if options.system is not None and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": options.system}, *messages]
    number = next((i for i, m in enumerate(messages) if m.get("role") == "assistant"), None)
    if number is not None and not all(str(m.get("content") or "").strip() for m in messages
                                      if m.get("role") == "assistant"):
        raise BadChat("empty answer", "an answer of the assistant holds no text")
    ids, response = render(messages, template, tokenizer, answers=options.answers)
    if not response.any():
        raise BadChat("no answer", "the chat holds no answer of the assistant" if number is None else
                      "the chat does not end with an answer, and only the last is to be learned")
    answer_tokens = int(response.sum())
    kept, response, cut = fit(ids, response, messages, options, template, tokenizer)
    prompt = "\n".join(f"{m['role']}: {m['content']}" for m in messages[:number])
    return Chat(kept, response, prompt, group_of(record, answer_tokens, options.group_by), cut)


def messages_of(record: Mapping[str, Any], options: ChatOptions) -> list[dict[str, Any]]:
    """The messages of a record, whatever its form. Raises `BadChat` where it holds none."""
    if options.prompt_field is not None:
        pair: tuple[str, str] | None = (options.prompt_field, options.answer_field or "")
    else:
        name = options.messages_field or next((n for n in MESSAGES if n in record), None)
        if name is not None:
            return turns(record.get(name), name)
        pair = next((p for p in PAIRS if p[0] in record and p[1] in record), None)
    if pair is None or pair[0] not in record or pair[1] not in record:
        wanted = " and ".join(pair) if pair else f"{', '.join(MESSAGES)}, or {' or '.join(map('+'.join, PAIRS))}"
        raise BadChat("fields missing", f"the record has the fields {', '.join(record)}; wanted: {wanted}")
    prompt, answer = (record[name] for name in pair)
    if pair == ("instruction", "output") and record.get("input"):
        prompt = f"{prompt}\n\n{record['input']}"
    return [*_side(prompt, "user", pair[0]), *_side(answer, "assistant", pair[1])]


def _side(value: Any, role: str, name: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else turns(value, name)


def turns(value: Any, name: str) -> list[dict[str, Any]]:
    """A list of messages with `role` and `content`; ShareGPT's `from` and `value` are renamed. Raises `BadChat`."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadChat("no messages", f"field {name!r} must be a text or a list of messages; got {value!r:.60}")
    if not all(isinstance(message, Mapping) for message in value):
        raise BadChat("no messages", f"field {name!r} must hold objects with `role` and `content`")
    named = [{"role": m["from"], "content": m["value"]} if "from" in m and "value" in m else dict(m) for m in value]
    return [{**m, "role": ROLE_NAMES.get(m["role"], m["role"])} if isinstance(m.get("role"), str) else m for m in named]


def fit(ids: np.ndarray, response: np.ndarray, messages: list[dict[str, Any]], options: ChatOptions,
        template: Template, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, bool]:
    """(ids, response, whether something was left out), no longer than `max_tokens`. Raises `BadChat` where the rule
    for what is too long leaves nothing to learn."""
    most = options.max_tokens
    if most is None or len(ids) <= most:
        return ids, response, False
    words = f"the chat has {len(ids)} tokens, max_tokens is {most}"
    if options.too_long == "end" and response[1:most].any():
        return ids[:most], response[:most], True
    if options.too_long == "start":
        last = len(response) - 1 - int(response[::-1].argmax())
        begin = last - int((~response[:last + 1][::-1]).argmax()) + 1 if not response[:last + 1].all() else 0
        if len(ids) - most < begin:  # at least one token stands before the last answer
            return ids[-most:], response[-most:], True
    if options.too_long == "turns":
        first = int(messages[0]["role"] == "system")
        while len(messages) > first + 2:
            # Down to the next question, so that the chat goes on beginning with one.
            begin = next((i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user"), len(messages))
            messages = messages[:first] + messages[begin:]
            if len(messages) <= first + 1:
                break
            ids, response = render(messages, template, tokenizer, answers=options.answers)
            if len(ids) <= most and response.any():
                return ids, response, True
    raise BadChat("too long", words + ("" if options.too_long == "skip" else
                                       f", and too_long={options.too_long!r} would leave no whole answer to learn"))


def group_of(record: Mapping[str, Any], answer_tokens: int, rule: str | None) -> str:
    """The group of a chat by `ChatOptions.group_by`, "" without. Raises `BadChat` where the field is absent."""
    if rule is None:
        return ""
    kind, value = rule.split(":", 1)
    if kind == "length":
        return "long" if answer_tokens >= int(value) else "short"
    if record.get(value) is None:
        raise BadChat("no group", f"the record has no field {value!r} to group by; it has {', '.join(record)}")
    return str(record[value])
