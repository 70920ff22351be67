"""What a model knows by heart of single texts, beside what it says of texts like them that it never saw.

Extraction: given the beginning of a text, does it go on with the rest (greedily, and by a beam search)? Membership: do
its probabilities tell members from controls? Both kinds of text go through the same measures.

Shape legend: B texts of a batch, T longest of them.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.core.batch import Batch
from lm.core.goldfish import Goldfish, dropped
from lm.core.types import Apply, Key, Params, State
from lm.eval import membership
from lm.eval.documents import target_nats
from lm.eval.memorization_options import MemorizationOptions
from lm.eval.memorization_texts import Matched, Text
from lm.eval.overlap import common_substring, rouge_l
from lm.generate.beam import beam_search
from lm.generate.decode import generate
from lm.generate.sampling import GREEDY

SET = "memorization"
MEANS = ("exact_match", "rouge_l", "longest_match", "beam_exact_match", "beam_any_match", "beam_rouge_l")
SCORES = ("loss", "zlib", "min_k", "reference")

Row = dict[str, Any]  # what is known of one text


class Report(NamedTuple):
    """metrics: over all texts. texts: one dict a text, members first."""

    metrics: dict[str, float]
    texts: list[Row]


@dataclasses.dataclass(frozen=True)
class Memorization:
    """Evaluator of `eval/memorization/<metric>`; docs/memorization.md says what each is.

    initial_state, decode: of the model, and of its tokenizer. goldfish: the mask that it was trained with, if any.
    reference: nats of every target of a text under a model that did not train on it, for the ratio of the two.
    """

    texts: Matched
    options: MemorizationOptions
    initial_state: Callable[..., State]
    decode: Callable[[Sequence[int]], str]
    goldfish: Goldfish | None = None
    reference: Callable[[Sequence[str]], list[np.ndarray]] | None = None

    def __call__(self, apply: Apply, params: Params, key: Key | None = None) -> Iterator[tuple[str, float]]:
        for name, value in self.measure(apply, params).metrics.items():
            yield f"eval/{SET}/{name}", value

    def measure(self, apply: Apply, params: Params) -> Report:
        """Every text through extraction and scores, and the metrics of both kinds."""
        rows = [[{"kind": kind, "number": n, "tokens": len(text.ids)} for n, text in enumerate(texts)]
                for kind, texts in (("member", self.texts.members), ("control", self.texts.controls))]
        both, every = [*self.texts.members, *self.texts.controls], [*rows[0], *rows[1]]
        size = min(self.options.batch_size, len(both))
        for start in range(0, len(both), size):
            part = slice(start, start + size)
            self._extract(apply, params, both[part], every[part], size)
            self._score(apply, params, both[part], every[part], size)
        return Report(self._summary(*rows), every)

    def _extract(self, apply: Apply, params: Params, texts: Sequence[Text], rows: Sequence[Row], size: int) -> None:
        options, suffix = self.options, self.options.suffix
        begin = [0 if options.prefix is None else len(text.ids) - suffix - options.prefix for text in texts]
        prompts = [text.ids[b:len(text.ids) - suffix] for text, b in zip(texts, begin, strict=True)]
        # As many prompts each time, so that the last batch needs no program of its own.
        prompts += [prompts[-1]] * (size - len(prompts))
        out = generate(apply, params, self.initial_state, prompts, max_new_tokens=suffix, options=GREEDY)
        for text, row, made in zip(texts, rows, out.rows, strict=False):
            row |= self._compare(text, made.tokens)
        if options.beams is None:
            return
        for text, row, prompt in zip(texts, rows, prompts, strict=False):
            found, = beam_search(apply, params, self.initial_state, [prompt], beams=options.beams,
                                 max_new_tokens=suffix)
            wanted = text.ids[len(text.ids) - suffix:]
            hits = [np.array_equal(beam.tokens, wanted) for beam in found]
            row |= {"beam_exact_match": float(hits[0]), "beam_any_match": float(any(hits)),
                    "beam_rouge_l": rouge_l(self.decode(found[0].tokens), self.decode(wanted))}

    def _compare(self, text: Text, made: np.ndarray) -> Row:
        """The continuation beside the true one; `first_miss` is None where it is the same."""
        suffix = self.options.suffix
        wanted = text.ids[len(text.ids) - suffix:]
        miss = np.flatnonzero(made != wanted)
        row = {"exact_match": float(not miss.size), "rouge_l": rouge_l(self.decode(made), self.decode(wanted)),
               "longest_match": common_substring(made.tolist(), wanted.tolist()),
               "first_miss": int(miss[0]) if miss.size else None, "completion": self.decode(made)}
        if self.goldfish is not None and self.goldfish.repeats:
            hidden = hidden_targets(self.goldfish, text.ids)[-suffix:]
            row |= {"dropped_share": float(hidden.mean()),
                    "miss_at_dropped": bool(hidden[miss[0]]) if miss.size else None}
        return row

    def _score(self, apply: Apply, params: Params, texts: Sequence[Text], rows: Sequence[Row], size: int) -> None:
        nats = target_nats(apply, params, [text.ids for text in texts], size)
        other = None if self.reference is None else self.reference([text.text for text in texts])
        for n, (text, row) in enumerate(zip(texts, rows, strict=True)):
            row |= {"loss": membership.mean_loss(nats[n]), "zlib": membership.zlib_ratio(nats[n], text.text),
                    "min_k": membership.min_k(nats[n], self.options.min_k)}
            if other is not None:
                row["reference"] = membership.reference_ratio(nats[n], other[n])

    def _summary(self, members: list[Row], controls: list[Row]) -> dict[str, float]:
        out = {"members": float(len(members)), "controls": float(len(controls)), "skipped": float(self.texts.skipped)}
        for name in (name for name in MEANS if name in members[0]):
            out[name] = float(np.mean([row[name] for row in members]))
            out[f"{name}_controls"] = float(np.mean([row[name] for row in controls]))
        for kind, rows in (("members", members), ("controls", controls)):
            out[f"loss_{kind}"] = float(np.mean([row["loss"] for row in rows]))
        for name in (name for name in SCORES if name in members[0]):
            scores = [row[name] for row in members], [row[name] for row in controls]
            out[f"auc_{name}"], out[f"tpr_{name}"] = membership.auc(*scores), membership.true_positives(*scores)
        for row in members:
            row["exposure"] = membership.exposure(row["loss"], [control["loss"] for control in controls])
        out["exposure"] = float(np.mean([row["exposure"] for row in members]))
        out["exposure_most"] = math.log2(len(controls) + 1)
        if "dropped_share" in members[0]:
            out["dropped_share"] = float(np.mean([row["dropped_share"] for row in members]))
            missed = [row["miss_at_dropped"] for row in members if row["first_miss"] is not None]
            out |= {"misses": float(len(missed))} | ({"miss_at_dropped": float(np.mean(missed))} if missed else {})
        return out


def hidden_targets(goldfish: Goldfish, ids: np.ndarray) -> np.ndarray:
    """[n - 1] bool: the targets of a document that the mask drops, where its first token begins a row."""
    one, places = np.ones((1, len(ids) - 1), np.int32), np.arange(len(ids) - 1, dtype=np.int32)[None]
    return dropped(goldfish, Batch(ids[None, :-1], ids[None, 1:], one.astype(np.float32), one, places))[0]
