"""The table of layers under contract. A new layer adds its row (or rows, one a variant that matters) here.

A row is (id, layer), or (id, block) where its first layer cannot stand alone. Every layer of `lm.layers.LAYERS` must
have at least one row: `test_every_layer_has_a_row`.
"""

from lm.layers.attention import Attention
from lm.layers.bswa import BSWA
from lm.layers.channel_mix import ChannelMix
from lm.layers.fam import FAM
from lm.layers.fam_block import FAMBlock
from lm.layers.min_rnn import MinGRU, MinLSTM
from lm.layers.mlp import MLP
from lm.layers.moe import MoE
from lm.layers.norm import RMSNorm
from lm.layers.peer import PEER
from lm.layers.pkm import PKM
from lm.layers.rwkv4 import RWKV4
from lm.layers.rwkv5 import RWKV5
from lm.layers.rwkv6 import RWKV6
from lm.layers.rwkv7 import RWKV7

EMBED_DIM = 32

# Under `-m slow`: variants that share almost all of their code with another row, and of expert layers all but one.
SLOW = {"attention_grouped", "attention_window", "attention_without_rope", "bswa_grouped", "bswa_without_memory",
        "channel_mix_5", "channel_mix_6", "fam_grouped", "fam_without_slots",
        "channel_mix_7", "min_gru", "min_gru_conv_tanh", "min_lstm_conv", "mlp_relu2", "moe_expert", "moe_swiglu",
        "moe_token", "peer_batch_gelu", "peer_l2_sigmoid", "peer_none_geglu", "pkm", "rwkv4_wide", "rwkv5", "rwkv6"}

ROWS = [
    ("attention", Attention(num_heads=4)),
    ("attention_grouped", Attention(num_heads=4, num_kv_heads=2, qk_norm=True, use_bias=True)),
    ("attention_window", Attention(num_heads=4, window=5)),
    ("attention_without_rope", Attention(num_heads=2, head_dim=6, rope_theta=None)),
    ("bswa", BSWA(num_heads=4, block=4, memory=1)),
    ("bswa_grouped", BSWA(num_heads=4, num_kv_heads=2, block=3, memory=2, same_reach=True, stop_gradient=True)),
    ("bswa_without_memory", BSWA(num_heads=2, block=5, memory=0)),
    ("channel_mix_4", ChannelMix()),
    ("channel_mix_5", ChannelMix(version=5)),
    ("channel_mix_6", ChannelMix(version=6)),
    ("channel_mix_7", ChannelMix(version=7, mlp_dim=48)),
    ("fam", FAMBlock((FAM(num_heads=4, block=4, memory=1, slots=2), MLP()), ("fam", "mlp"), RMSNorm())),
    ("fam_grouped", FAMBlock((FAM(num_heads=4, num_kv_heads=2, block=3, memory=0, slots=3, slot_position="zero"),
                              MLP(activation="swiglu")), ("fam", "mlp"), RMSNorm(), sandwich=True)),
    ("fam_without_slots", FAMBlock((FAM(num_heads=2, block=5, slots=0), MLP()), ("fam", "mlp"), RMSNorm())),
    ("min_gru", MinGRU()),
    ("min_gru_conv_tanh", MinGRU(hidden_act="tanh", conv_width=4, use_bias=True)),
    ("min_lstm", MinLSTM(hidden_act="identity", hidden_dim=24)),
    ("min_lstm_conv", MinLSTM(conv_width=3)),
    ("mlp_gelu", MLP()),
    ("mlp_swiglu", MLP(activation="swiglu")),
    ("peer_batch_gelu", PEER(num_experts=64, num_heads=4, top_k=4)),
    ("peer_l2_sigmoid", PEER(num_experts=49, num_heads=2, top_k=3, query_norm="l2", gate="sigmoid", key_dim=8)),
    ("peer_layer_keys", PEER(num_experts=64, num_heads=4, top_k=4, query_norm="layer", per_head_keys=True,
                             activation="relu")),
    ("peer_none_geglu", PEER(num_experts=36, num_heads=2, top_k=4, query_norm="none", activation="geglu", chunk=7)),
    ("moe_token", MoE(num_experts=4, mlp_dim=24)),
    ("moe_swiglu", MoE(num_experts=8, top_k=1, mlp_dim=16, activation="swiglu", renormalize=False, chunk=5)),
    ("moe_expert", MoE(num_experts=4, mlp_dim=24, routing="expert")),
    ("pkm", PKM(num_values=64, num_heads=2, top_k=4)),
    ("rwkv4", RWKV4()),
    ("rwkv4_wide", RWKV4(attention_dim=48)),
    ("rwkv5", RWKV5(head_dim=8)),
    ("rwkv6", RWKV6(head_dim=8, mix_rank=4, decay_rank=6)),
    ("rwkv7", RWKV7(head_dim=8, value_residual=False)),
    ("mlp_relu2", MLP(activation="relu2", use_bias=True, mlp_dim=48)),
]
