"""What a memorization test is made of: texts that were trained on, and matched texts that were not."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lm.data.options import DataOptions
from lm.data.sources import read_documents
from lm.data.tokenizer import Tokenizer
from lm.eval.memorization_options import MemorizationOptions
from lm.eval.samples import encode_prompt
from lm.eval.sets import KINDS

log = logging.getLogger(__name__)

UNMATCHED = 1.25  # mean lengths that differ by more than this are said


class Text(NamedTuple):
    """ids: [n] int32, with bos in front where the training data has it. text: what they say."""

    ids: np.ndarray
    text: str


class Matched(NamedTuple):
    """Members and controls, each long enough for prefix and suffix. skipped: how many were too short."""

    members: list[Text]
    controls: list[Text]
    skipped: int


def read_texts(path: str, data: DataOptions, tokenizer: Tokenizer) -> list[Text]:
    """Every document of the file, folder or glob, as the training data of `data` would have it."""
    kind = next((kind for ending, kind in KINDS.items() if path.lower().endswith(ending)), "text")
    given = DataOptions(source=kind, path=path, text_field=data.text_field, separator=data.separator)
    return [Text(encode_prompt(tokenizer, text, add_bos=data.add_bos), text) for text in read_documents(given)]


def texts_of(documents: Iterable[np.ndarray], decode: Callable[[np.ndarray], str]) -> list[Text]:
    """Documents that are ids already."""
    return [Text(np.asarray(ids, np.int32), decode(ids)) for ids in documents]


def matched(members: Sequence[Text], controls: Sequence[Text], options: MemorizationOptions, *, seq_len: int,
            decode: Callable[[np.ndarray], str]) -> Matched:
    """The texts cut to rows of seq_len, without those that are too short, at most `options.limit` of each.

    Raises ValueError where a control is a member too, where lengths do not fit a row, and where nothing is left.
    """
    needed = (options.prefix or 1) + options.suffix
    if needed > seq_len:
        raise ValueError(f"prefix={options.prefix} and suffix={options.suffix} need {needed} tokens, and training rows "
                         f"have {seq_len}: a text is learned in rows of that length; give shorter ones")
    known = {text.ids.tobytes(): n for n, text in enumerate(members)}
    if (twice := next((n for n, text in enumerate(controls) if text.ids.tobytes() in known), None)) is not None:
        raise ValueError(f"control {twice} is member {known[controls[twice].ids.tobytes()]}: a control is a text that "
                         f"was not trained on; remove it")
    out, skipped = [], 0
    for texts in (members, controls):
        long = [text for text in texts if len(text.ids) >= needed]
        skipped += len(texts) - len(long)
        out.append([text if len(text.ids) <= seq_len else Text(text.ids[:seq_len], decode(text.ids[:seq_len]))
                    for text in long[:options.limit]])
    for name, kept, texts in zip(("members", "controls"), out, (members, controls), strict=True):
        if not kept:
            longest = max((len(text.ids) for text in texts), default=0)
            raise ValueError(f"none of the {len(texts)} {name} has {needed} tokens (the longest has {longest}); give "
                             f"longer texts, or a shorter prefix or suffix")
    if skipped:
        log.warning("%d texts are shorter than prefix and suffix (%d tokens) and were left out", skipped, needed)
    means = [np.mean([len(text.ids) for text in texts]) for texts in out]
    if max(means) > UNMATCHED * min(means):
        log.warning("members have %.0f tokens in the mean and controls %.0f: they are not matched, and a difference "
                    "between them may be one of length", *means)
    return Matched(*out, skipped)
