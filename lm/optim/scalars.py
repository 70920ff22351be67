"""The numbers of an optimizer that runs of one compiled program may differ in."""

from typing import NamedTuple

import numpy as np

from lm.core.types import Array
from lm.optim.options import OptimizerOptions
from lm.optim.rules import Row


class Scalars(NamedTuple):
    """learning_rate: the peak. weight_decay, lr_multiplier: [number of parameters], in the order of the rows."""

    learning_rate: Array
    weight_decay: Array
    lr_multiplier: Array


def scalars_of(options: OptimizerOptions, rows: tuple[Row, ...]) -> Scalars:
    """The numbers of one run, in float32 on the host."""
    return Scalars(np.float32(options.learning_rate), np.array([row.weight_decay for row in rows], np.float32),
                   np.array([row.lr_multiplier for row in rows], np.float32))


def same_program(rows: tuple[Row, ...], others: tuple[Row, ...]) -> bool:
    """Whether two optimizers have the same steps and state: what is left out where it is 0 or 1 is so in both."""
    outline = lambda row: (row.name, row.shape, row.optimizer, row.frozen, row.held, row.weight_decay == 0,
                           row.lr_multiplier == 1)
    return [outline(row) for row in rows] == [outline(row) for row in others]
