"""From a record to what is compared: one prompt with a chosen and a rejected response, or with one that is good or bad.

A record is one of

    {"prompt": ..., "chosen": ..., "rejected": ...}     texts, or lists of messages with `role` and `content`
    {"chosen": [messages], "rejected": [messages]}      the prompt is what both begin with
    {"chosen": "\\n\\nHuman: ...", "rejected": ...}       the same, as the HH data of Anthropic write it
    {"prompt": ..., "completion": ..., "label": true}   a response by itself, for KTO
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.core.fields import check_known, option
from lm.data.chat import check_messages, render
from lm.data.chat_rows import BAD_ROWS, turns
from lm.data.chat_template import BadChat, Template
from lm.data.tokenizer import Tokenizer

CHOSEN, REJECTED, MISMATCHED = range(3)
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class PreferenceOptions:
    """How records become pairs."""

    template: str | None = option(None, "chat template: a built-in name (chatml, plain, text), the path of a Jinja "
                                        "file, or the template; None is what lies beside the tokenizer")
    prompt_field: str = option("prompt", "field with the prompt (text or messages)")
    chosen_field: str = option("chosen", "field with the chosen response, or with the whole chosen dialogue")
    rejected_field: str = option("rejected", "field with the rejected one")
    completion_field: str = option("completion", "field with a response that stands alone")
    label_field: str = option("label", "field that says whether that response is desirable: true or false")
    system: str | None = option(None, "text of a system message for dialogues that have none")
    learn_end: bool = option(True, "the token that ends a response counts as part of it")
    bad_rows: str = option("skip", "a row that cannot be used: skip counts and reports it, refuse stops there")

    def check(self) -> None:
        """Raises ValueError for an unknown choice."""
        check_known([self.bad_rows], BAD_ROWS, "bad_rows", "choice")


class Document(NamedTuple):
    """A prompt with one response. kind: CHOSEN (desirable) or REJECTED (undesirable). ids: [tokens] int32. response:
    [tokens] bool. prompt: tokens before the response."""

    kind: int
    ids: np.ndarray
    response: np.ndarray
    prompt: int


def documents_of(record: Mapping[str, Any], options: PreferenceOptions, template: Template,
                 tokenizer: Tokenizer) -> tuple[list[Document], str]:
    """(the documents of a record, chosen first; the text of its prompt). Raises `BadChat` for a record that cannot be
    used: fields missing, no messages, an unknown role, an empty response, equal responses, prompts that differ."""
    prompt, sides = sides_of(record, options)
    if options.system is not None and (not prompt or prompt[0].get("role") != "system"):
        prompt = [{"role": "system", "content": options.system}, *prompt]
    for kind, messages in sides:
        check_messages([*prompt, *messages], getattr(tokenizer, "special_tokens", {}))
        answers = [m for m in messages if m.get("role") == "assistant"]
        if not answers or not all(str(m.get("content") or "").strip() for m in answers):
            raise BadChat("empty response", f"the {'chosen' if kind == CHOSEN else 'rejected'} response holds no text "
                                            f"of the assistant")
    if len(sides) == 2 and sides[0][1] == sides[1][1]:
        raise BadChat("identical responses", "chosen and rejected are the same, so there is nothing to prefer")
    if not prompt:
        raise BadChat("empty prompt", "there is no prompt before the response, so its first token has no input")
    made = [document(kind, prompt, messages, template, tokenizer, options) for kind, messages in sides]
    if len(made) == 2 and not np.array_equal(made[0].ids[:made[0].prompt], made[1].ids[:made[1].prompt]):
        raise BadChat("prompts differ", f"the chat template {template.name} writes the prompt of the chosen and of the "
                                        f"rejected response differently")
    if len(made) == 2 and np.array_equal(made[0].ids, made[1].ids):
        raise BadChat("identical responses", "chosen and rejected are the same tokens")
    return made, "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def document(kind: int, prompt: list[dict[str, Any]], messages: list[dict[str, Any]], template: Template,
             tokenizer: Tokenizer, options: PreferenceOptions) -> Document:
    """The tokens of a prompt and a response, of which those of the assistant after the prompt count."""
    ids, answers = render([*prompt, *messages], template, tokenizer)
    begins = np.flatnonzero(answers & ~np.concatenate([[False], answers[:-1]]))
    ends = np.flatnonzero(answers & ~np.concatenate([answers[1:], [False]]))
    before = sum(m.get("role") == "assistant" for m in prompt)
    if len(begins) != before + sum(m.get("role") == "assistant" for m in messages):
        raise BadChat("answers not found", f"the chat template {template.name} leaves no token between two answers")
    response = answers.copy()
    response[:begins[before]] = False
    if not options.learn_end:
        response[ends[before:]] = False
        if not response.any():
            raise BadChat("empty response", "the response is its end token alone")
    return Document(kind, ids, response, int(begins[before]))


def sides_of(record: Mapping[str, Any], options: PreferenceOptions
             ) -> tuple[list[dict[str, Any]], list[tuple[int, list[dict[str, Any]]]]]:
    """(messages of the prompt, (kind, messages of the response) of each side)."""
    names = (options.chosen_field, options.rejected_field)
    if all(name in record for name in names):
        chosen, rejected = (record[name] for name in names)
        if options.prompt_field in record:
            prompt = _messages(record[options.prompt_field], "user", options.prompt_field)
            both = [_messages(value, "assistant", name) for value, name in zip((chosen, rejected), names, strict=True)]
            # Some data repeat the prompt in front of the response.
            both = [side[len(prompt):] if len(side) > len(prompt) and side[:len(prompt)] == prompt else side
                    for side in both]
        else:
            prompt, both = common_prompt(_dialogue(chosen, names[0]), _dialogue(rejected, names[1]))
        return prompt, [(CHOSEN, both[0]), (REJECTED, both[1])]
    alone = (options.prompt_field, options.completion_field, options.label_field)
    if all(name in record for name in alone):
        label = record[options.label_field]
        if not isinstance(label, bool):
            raise BadChat("no label", f"field {options.label_field!r} must be true or false; got {label!r:.40}")
        response = _messages(record[options.completion_field], "assistant", options.completion_field)
        return _messages(record[options.prompt_field], "user", options.prompt_field), [
            (CHOSEN if label else REJECTED, response)]
    raise BadChat("fields missing", f"the record has the fields {', '.join(map(str, record))}; wanted: "
                                    f"{' and '.join(names)}, or {', '.join(alone)}")


def common_prompt(chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]
                  ) -> tuple[list[dict[str, Any]], tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """(messages that both dialogues begin with, what follows in each). Raises `BadChat` where they part at something
    that is no answer: the model would be compared on different questions."""
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if same == len(chosen) == len(rejected):
        same = max(same - 1, 0)  # equal to the end: the last message is the response, and is found to be identical
    parted = [side[same:] for side in (chosen, rejected)]
    if any(not side or side[0].get("role") != "assistant" for side in parted):
        raise BadChat("prompts differ", f"the dialogues part at message {same}, which is no answer of the assistant in "
                                        f"both")
    return chosen[:same], (parted[0], parted[1])


def _messages(value: Any, role: str, name: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else turns(value, name)


def _dialogue(value: Any, name: str) -> list[dict[str, Any]]:
    """The messages of a whole dialogue, as a list or as text with "\\n\\nHuman:" and "\\n\\nAssistant:"."""
    if not isinstance(value, str):
        return turns(value, name) if isinstance(value, Sequence) else _refuse(name)
    parts = _TURN.split(value)
    if parts[0].strip() or len(parts) < 3:
        _refuse(name)
    return [{"role": _ROLES[who], "content": text.strip()}
            for who, text in zip(parts[1::2], parts[2::2], strict=True)]


def _refuse(name: str) -> Any:
    raise BadChat("no prompt", f"field {name!r} stands without a prompt, so it must be a list of messages, or a text "
                               f"that begins with '\\n\\nHuman:'")
