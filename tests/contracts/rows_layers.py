"""The table of layers under contract. A new layer adds its row (or rows, one a variant that matters) here.

A row is (id, layer). Every layer of `lm.layers.LAYERS` must have at least one row: `test_every_layer_has_a_row`.
"""

from lm.layers.attention import Attention
from lm.layers.mlp import MLP

EMBED_DIM = 32

ROWS = [
    ("attention", Attention(num_heads=4)),
    ("attention_grouped", Attention(num_heads=4, num_kv_heads=2, qk_norm=True, use_bias=True)),
    ("attention_window", Attention(num_heads=4, window=5)),
    ("attention_without_rope", Attention(num_heads=2, head_dim=6, rope_theta=None)),
    ("mlp_gelu", MLP()),
    ("mlp_swiglu", MLP(activation="swiglu")),
    ("mlp_relu2", MLP(activation="relu2", use_bias=True, mlp_dim=48)),
]
