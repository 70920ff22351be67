"""The losses that a config may name in `loss`. To add one: its file, and its line here.

A value is a loss, a function (TokenScores, Batch) -> [B, T]; one with options is a class whose instances are that.
"""

from lm.losses.cross_entropy import next_token, z_loss
from lm.losses.distillation import Distill
from lm.losses.routing import Reported

LOSSES = {
    "next_token": next_token,
    "z_loss": z_loss,
}

# Losses that compare with a teacher's predictions, which come with the batch (`data.teacher`).
TAUGHT = {
    "distill": Distill,
}

# Losses that layers report themselves.
REPORTED = {
    "load_balance": Reported("load_balance", additive=False),
    "router_z": Reported("router_z", additive=True),
}
