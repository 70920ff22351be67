"""`lm data prepare --kind preference`: chosen and rejected responses to tokens that know what belongs together."""

import argparse
import dataclasses
import time
from typing import Any

from lm.data.preference.examples import PreferenceOptions

# Fields of PreferenceOptions whose flags chats have too, and those of pairs alone.
SHARED = ("template", "prompt_field", "system", "bad_rows")
_FLAGS = ("chosen_field", "rejected_field", "completion_field", "label_field")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of pairs, in a group of their own."""
    group = parser.add_argument_group(f"prepare --kind preference (also {', '.join(map(flag, SHARED))})")
    docs = {field.name: field.metadata["doc"] for field in dataclasses.fields(PreferenceOptions)}
    for name in _FLAGS:
        group.add_argument(flag(name), help=docs[name], metavar="FIELD")
    group.add_argument("--learn-end", action=argparse.BooleanOptionalAction, default=None, help=docs["learn_end"])


def flag(name: str) -> str:
    """`--chosen-field` of chosen_field."""
    return f"--{name.replace('_', '-')}"


def own_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that only pairs have, as far as flags set them."""
    return {name: getattr(args, name) for name in (*_FLAGS, "learn_end") if getattr(args, name) is not None}


def prepare_pairs(source: Any, tokenizer: Any, data: Any, args: argparse.Namespace) -> int:
    """Writes the folder and prints what became of every row."""
    from lm.data.preference.prepare import prepare_preferences
    begin = time.monotonic()
    given = own_options(args) | {name: getattr(args, name) for name in SHARED if getattr(args, name) is not None}
    manifest, account = prepare_preferences(source, PreferenceOptions(**given), tokenizer, args.out,
                                            validation_fraction=data.validation_fraction, split_seed=data.split_seed)
    for line in account.lines():
        print(line)
    made = manifest["preference"]
    print(f"{args.out}: {made['pairs']:,} pairs, {made['single']:,} single responses, {manifest['num_tokens']:,} "
          f"tokens, {manifest['num_targets']:,} of them responses, {time.monotonic() - begin:.1f} s\n"
          f"use it with data=dict(source='pairs', path={args.out!r})")
    return 0
