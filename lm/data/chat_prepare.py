"""Chats to a prepared folder: the tokens, which of them are answers, and an account of every row left out."""

import collections
import json
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from lm.data.chat_rows import ChatOptions, chat_of
from lm.data.chat_template import BadChat, Template, load_template
from lm.data.encoding import Encoded, content_hash
from lm.data.options import SourceOptions
from lm.data.prepare import write_prepared
from lm.data.records import read_records
from lm.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

BAD_ROWS = "bad_rows.jsonl"
TEMPLATE = "chat_template.jinja"


class Account:
    """What became of the rows that were read: how many were kept or cut, and the fault of each that was left out.

    refuse: the first fault is raised, as a ValueError with its place.
    """

    def __init__(self, *, refuse: bool) -> None:
        self._refuse = refuse
        self.rows = self.kept = self.cut = 0
        self.faults: list[dict[str, str]] = []

    def bad(self, where: str, fault: BadChat) -> None:
        """Notes a row that cannot be used."""
        if self._refuse:
            raise ValueError(f"{where}: {fault} (bad_rows='skip' leaves such rows out and counts them)") from None
        self.faults.append({"where": where, "reason": fault.reason, "message": str(fault)})

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows left out, by reason, the most frequent first."""
        return dict(collections.Counter(fault["reason"] for fault in self.faults).most_common())

    def lines(self, shown: int = 3) -> Iterator[str]:
        """What a user has to know: a line a reason, with the places of the first rows that it befell."""
        yield f"{self.rows:,} rows: {self.kept:,} kept ({self.cut:,} of them cut), {len(self.faults):,} left out"
        for reason, count in self.counts.items():
            found = [fault for fault in self.faults if fault["reason"] == reason]
            places = ", ".join(fault["where"] for fault in found[:shown])
            yield (f"  {reason}: {count:,}, at {places}{' and others' if count > shown else ''}; the first: "
                   f"{found[0]['message']}")

    def write(self, folder: pathlib.Path) -> dict[str, Any]:
        """Writes every fault to <folder>/bad_rows.jsonl and returns the counts for the manifest."""
        with (folder / BAD_ROWS).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(fault, ensure_ascii=False) + "\n" for fault in self.faults)
        return {"rows": self.rows, "kept": self.kept, "cut": self.cut, "left_out": self.counts}


def prepare_chats(source: SourceOptions, options: ChatOptions, tokenizer: Tokenizer, out: str, *,
                  validation_fraction: float | None = None, split_seed: int = 0
                  ) -> tuple[dict[str, Any], Account]:
    """Writes the chats of a source into the new folder `out`; returns (manifest, account of the rows).

    The split is decided by what stands before the first answer: all answers to one prompt are on one side. Raises
    ValueError where no row can be used, with the reasons; and at the first bad row with bad_rows="refuse".
    """
    options.check()
    template = load_template(options.template, tokenizer)
    account = Account(refuse=options.bad_rows == "refuse")
    groups: dict[str, int] = {}

    def notes(folder: pathlib.Path) -> dict[str, Any]:
        (folder / TEMPLATE).write_text(template.source, encoding="utf-8")
        return {"chat": {"template": template.name, "fingerprint": template.fingerprint, "bos": template.bos,
                         "eos": template.eos, "answers": options.answers, "max_tokens": options.max_tokens,
                         "too_long": options.too_long, "group_by": options.group_by, "groups": list(groups),
                         **account.write(folder)}}

    manifest = write_prepared(_documents(source, options, template, tokenizer, account, groups), tokenizer, out,
                              validation_fraction=validation_fraction, split_seed=split_seed, notes=notes)
    return manifest, account


def _documents(source: SourceOptions, options: ChatOptions, template: Template, tokenizer: Tokenizer,
               account: Account, groups: dict[str, int]) -> Iterator[Encoded]:
    sizes = tokenizer.token_bytes
    for where, record in read_records(source):
        account.rows += 1
        try:
            if isinstance(record, BadChat):
                raise record
            chat = chat_of(record, options, template, tokenizer)
        except BadChat as fault:
            account.bad(where, fault)
            continue
        account.kept, account.cut = account.kept + 1, account.cut + chat.cut
        group = groups.setdefault(chat.group, len(groups))
        # What special tokens are written as is no text, so the bytes are those of the tokens.
        yield Encoded(chat.ids, int(np.sum(sizes[chat.ids])), content_hash(chat.prompt.encode("utf-8")), chat.response,
                      group)
    if not account.kept:
        raise ValueError("no row can be used\n" + "\n".join(account.lines()))
