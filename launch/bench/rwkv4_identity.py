"""RWKV-4 with the identity in place of its recurrence: what the rest of a train step costs."""

from launch.bench import rwkv4
from lm.layers import rwkv4 as layer

config, from_torch = rwkv4.config, rwkv4.from_torch
layer.wkv4 = lambda w, u, k, v, state, reset, implementation: (v, state)
