"""Preferences to a prepared folder: tokens and masks as those of chats, which belong together, and every row's fate.

Beside what `lm.data.prepared` describes the folder holds pairs.npy (int64 [3, N]: of each document the number of its
record, its kind, the tokens of its prompt) and places.txt (file and line of each record that was kept).
"""

import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from lm.data.chat_prepare import TEMPLATE, Account
from lm.data.chat_template import BadChat, Template, load_template
from lm.data.encoding import Encoded, content_hash
from lm.data.options import SourceOptions
from lm.data.preference.examples import PreferenceOptions, documents_of
from lm.data.prepare import write_prepared
from lm.data.records import read_records
from lm.data.tokenizer import Tokenizer

PAIRS_FILE, PLACES_FILE = "pairs.npy", "places.txt"


def prepare_preferences(source: SourceOptions, options: PreferenceOptions, tokenizer: Tokenizer, out: str, *,
                        validation_fraction: float | None = None, split_seed: int = 0
                        ) -> tuple[dict[str, Any], Account]:
    """Writes the pairs (and single responses) of a source into the new folder `out`; returns (manifest, account of the
    rows).

    The split is decided by the prompt: all that is said to one prompt is on one side. Raises ValueError where no row
    can be used, with the reasons; and at the first bad row with bad_rows="refuse".
    """
    options.check()
    template = load_template(options.template, tokenizer)
    account = Account(refuse=options.bad_rows == "refuse")
    table: list[tuple[int, int, int]] = []
    places: list[str] = []

    def notes(folder: pathlib.Path) -> dict[str, Any]:
        (folder / TEMPLATE).write_text(template.source, encoding="utf-8")
        np.save(folder / PAIRS_FILE, np.array(table, np.int64).T, allow_pickle=False)
        (folder / PLACES_FILE).write_text("".join(f"{place}\n" for place in places), encoding="utf-8")
        paired = len(table) - len(places)
        return {"chat": {"template": template.name, "fingerprint": template.fingerprint, "bos": template.bos,
                         "eos": template.eos, "groups": [""], **account.write(folder)},
                "preference": {"pairs": paired, "single": len(places) - paired, "learn_end": options.learn_end,
                               "sha256": hashlib.sha256((folder / PAIRS_FILE).read_bytes()).hexdigest()}}

    manifest = write_prepared(_documents(source, options, template, tokenizer, account, table, places), tokenizer, out,
                              validation_fraction=validation_fraction, split_seed=split_seed, notes=notes)
    return manifest, account


def _documents(source: SourceOptions, options: PreferenceOptions, template: Template, tokenizer: Tokenizer,
               account: Account, table: list[tuple[int, int, int]], places: list[str]) -> Iterator[Encoded]:
    sizes = tokenizer.token_bytes
    for where, record in read_records(source):
        account.rows += 1
        try:
            if isinstance(record, BadChat):
                raise record
            made, prompt = documents_of(record, options, template, tokenizer)
        except BadChat as fault:
            account.bad(where, fault)
            continue
        account.kept += 1
        number, content = len(places), content_hash(prompt.encode("utf-8"))
        places.append(where)
        for one in made:
            table.append((number, one.kind, one.prompt))
            yield Encoded(one.ids, int(np.sum(sizes[one.ids])), content, one.response, 0)
    if not account.kept:
        raise ValueError("no row can be used\n" + "\n".join(account.lines()))
