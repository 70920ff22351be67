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
from lm.eval.sets import kind_of

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
    """Every document of the file, folder or glob, as the training data of `data` would have it. Raises ValueError for
    what cannot be read."""
    given = DataOptions(source=kind_of(path), path=path, text_field=data.text_field, separator=data.separator)
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
    # As they are compared: texts that part after the end of a row are one and the same here.
    known = {text.ids[:seq_len].tobytes(): n for n, text in enumerate(members)}
    for n, text in enumerate(controls):
        if (same := known.get(text.ids[:seq_len].tobytes())) is not None:
            cut = "" if np.array_equal(text.ids, members[same].ids) else f" in the {seq_len} tokens of a row"
            raise ValueError(f"control {n} is member {same}{cut}: a control is a text that was not trained on; remove "
                             f"it")
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
