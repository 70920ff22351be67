"""`lm data prepare --kind chat`: messages, or prompts with answers, to tokens that know which of them are answers."""

import argparse
import dataclasses
import time
from typing import Any

from lm.data.chat_rows import BAD_ROWS, TOO_LONG, ChatOptions

# Field of ChatOptions by flag; what a flag says is the field's own line.
_FLAGS = ("template", "messages_field", "prompt_field", "answer_field", "system", "answers", "max_tokens", "too_long",
          "bad_rows", "group_by")
_CHOICES = {"too_long": TOO_LONG, "bad_rows": BAD_ROWS, "answers": ("all", "last")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of chats, in a group of their own."""
    group = parser.add_argument_group("prepare --kind chat")
    docs = {field.name: field.metadata["doc"] for field in dataclasses.fields(ChatOptions)}
    for name in _FLAGS:
        group.add_argument(f"--{name.replace('_', '-')}", choices=_CHOICES.get(name), help=docs[name],
                           type=int if name == "max_tokens" else str,
                           metavar=None if name in _CHOICES else name.split("_")[-1].upper())


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `ChatOptions` that flags set."""
    return {name: getattr(args, name) for name in _FLAGS if getattr(args, name) is not None}


def prepare_chat(source: Any, tokenizer: Any, data: Any, args: argparse.Namespace) -> int:
    """Writes the folder and prints what became of every row."""
    from lm.data.chat_prepare import prepare_chats
    begin = time.monotonic()
    manifest, account = prepare_chats(source, ChatOptions(**given_options(args)), tokenizer, args.out,
                                      validation_fraction=data.validation_fraction, split_seed=data.split_seed)
    for line in account.lines():
        print(line)
    groups = [name for name in manifest["chat"]["groups"] if name]
    print(f"{args.out}: {manifest['num_documents']:,} chats, {manifest['num_tokens']:,} tokens, "
          f"{manifest['num_targets']:,} of them answers{', groups ' + ', '.join(groups) if groups else ''}, "
          f"{time.monotonic() - begin:.1f} s\nuse it with data=dict(source='array_record', path={args.out!r})")
    return 0
