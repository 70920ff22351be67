"""The layers that a config may name, by the `kind` of an entry of `model`. To add one: its file, and its line here."""

from lm.layers.attention import Attention
from lm.layers.mlp import MLP

LAYERS = {
    "attention": Attention,
    "mlp": MLP,
}
