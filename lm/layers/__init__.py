"""The layers that a config may name, by the `kind` of an entry of `model`. To add one: its file, and its line here."""

from lm.layers.attention import Attention
from lm.layers.bswa import BSWA
from lm.layers.channel_mix import ChannelMix
from lm.layers.fam import FAM
from lm.layers.min_rnn import MinGRU, MinLSTM
from lm.layers.mlp import MLP
from lm.layers.moe import MoE
from lm.layers.peer import PEER
from lm.layers.pkm import PKM
from lm.layers.rwkv4 import RWKV4
from lm.layers.rwkv5 import RWKV5
from lm.layers.rwkv6 import RWKV6
from lm.layers.rwkv7 import RWKV7

LAYERS = {
    "attention": Attention,
    "bswa": BSWA,
    "channel_mix": ChannelMix,
    "fam": FAM,
    "min_gru": MinGRU,
    "min_lstm": MinLSTM,
    "mlp": MLP,
    "moe": MoE,
    "peer": PEER,
    "pkm": PKM,
    "rwkv4": RWKV4,
    "rwkv5": RWKV5,
    "rwkv6": RWKV6,
    "rwkv7": RWKV7,
}
