"""The losses that a config may name in `loss`. To add one: its file, and its line here.

A value is a loss, a function (TokenScores, Batch) -> [B, T]; one with options is a class whose instances are that.
"""

from lm.losses.cross_entropy import next_token, z_loss

LOSSES = {
    "next_token": next_token,
    "z_loss": z_loss,
}
