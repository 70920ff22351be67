"""The goldfish mask of a config, `loss.goldfish`, and what a step reports of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from lm.core.batch import Batch, MaskedBatch
from lm.core.fields import build, fill
from lm.core.goldfish import Goldfish
from lm.core.types import Mean, TokenScores

GOLDFISH = "goldfish"  # of the group `loss`, but of the batch and no loss: it composes with all of them
WHERE = f"config.loss.{GOLDFISH}"


def resolve_goldfish(given: Any) -> dict[str, Any]:
    """The complete entry: at most one, {"goldfish": fields}, and none where `given` is None. Raises ValueError for
    fields that make no mask."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{WHERE} is a mask, not a loss with a weight: give its fields, e.g. dict(k=4, h=13), an "
                         f"empty dict for the defaults, or None for no mask; got {given!r}")
    build(Goldfish, given, WHERE)  # for its own check
    return {GOLDFISH: fill(Goldfish, given, WHERE)}


def goldfish_of(config: Mapping[str, Any], special: Sequence[int], seq_len: int | None = None) -> Goldfish | None:
    """The mask that the `loss` group asks for, with the tokenizer's special ids exempt; None where it asks for none.

    Raises ValueError where rows of seq_len are too short for it.
    """
    given = config.get(GOLDFISH)
    if given is None:
        return None
    made = build(Goldfish, given, WHERE).with_exempt(special)
    if seq_len is not None:
        made.check_length(seq_len, WHERE)
    return made


def apart(scores: TokenScores, batch: Batch | MaskedBatch) -> dict[str, Mean]:
    """Of a batch with a mask: nats a target that the mask left (`goldfish_kept`) and that it took out
    (`goldfish_dropped`), and the share of the latter in the weights (`goldfish_share`)."""
    if not isinstance(batch, MaskedBatch):
        return {}
    kept, hidden = Mean.of(-scores.logp, batch.weights), Mean.of(-scores.logp, batch.dropped)
    return {"goldfish_kept": kept, "goldfish_dropped": hidden,
            "goldfish_share": Mean(hidden.count, kept.count + hidden.count)}
