"""Which documents are held out for validation."""

import numpy as np

from lm.data.hashing import uniform

DEFAULT_FRACTION = 0.05


def validation_mask(content: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """[N] bool: true for documents to validate on.

    A document's side depends on its own text and the seed alone: it stays when documents are added, files renamed or
    workers changed, and copies of a text stand on one side. With a fraction above 0 at least one document is held out
    and at least one is not. Raises ValueError where there are too few for that.
    """
    if fraction == 0:
        return np.zeros(len(content), bool)
    if len(content) < 2:
        raise ValueError(f"{len(content)} document cannot be divided into training and validation; divide the text "
                         f"with data.separator or data.max_document_chars (prepared data: when it is prepared), give "
                         f"data.validation=dict(source=..., path=...), or set data.validation_fraction=0")
    draw = uniform(content, "split", seed)
    mask = draw < fraction
    if not mask.any():
        mask[draw.argmin()] = True
    if mask.all():
        mask[draw.argmax()] = False
    return mask
