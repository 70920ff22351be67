"""The table of losses under contract. A new loss adds its row (or rows, one a set of options that matters) here.

A row is (id, loss). Every loss of `lm.losses.LOSSES` must have at least one row: `test_every_loss_has_a_row`.
"""

from lm.losses.cross_entropy import next_token, z_loss

ROWS = [
    ("next_token", next_token),
    ("z_loss", z_loss),
]
