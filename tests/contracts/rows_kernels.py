"""The table of kernel operations under contract. A new operation adds its row here.

The inputs of an operation are a dict of numpy arrays, floats in float64 and the rest as the operation takes them;
`op(**inputs, implementation=name)` gives one array or a tuple of them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from pallas_kernels.linear_scan import linear_scan, min_gru, min_lstm
from pallas_kernels.peer_experts import peer_experts
from pallas_kernels.product_key_topk import product_key_topk
from pallas_kernels.wkv4 import wkv4
from pallas_kernels.wkv6 import wkv6
from pallas_kernels.wkv7 import wkv7


class Scan(NamedTuple):
    """What a recurrence promises besides: pieces that hand on the state equal the whole, and documents are separate."""
    time: tuple[str, ...]               # inputs with time on axis 1; the first output has it too
    state: str                          # the input that the last output continues
    reset: str | None = "reset"


class Row(NamedTuple):
    name: str
    op: Callable
    oracle: Callable                    # numpy only, written from the formula, float64
    make: Callable[..., Mapping]        # make(rng, *size) -> inputs
    sizes: tuple[tuple[int, ...], ...]  # odd lengths, length 1, widths off the tile
    kernels: tuple[str, ...]            # implementations that are device kernels
    kernel_cases: tuple[tuple[tuple[int, ...], str], ...]   # (size, dtype): few, as the interpreter takes seconds each
    slow_kernel_sizes: tuple[tuple[int, ...], ...]          # in both dtypes
    full_size: tuple[int, ...]          # as in a 1.5B model: what is compiled ahead of time
    scan: Scan | None = None
    narrow: tuple[str, ...] = ()        # inputs that follow the compute dtype; other floats stay float32
    gpu_kernels: tuple[str, ...] = ()                       # implementations that are GPU kernels
    gpu_cases: tuple[tuple[tuple[int, ...], str], ...] = ()
    slow_gpu_sizes: tuple[tuple[int, ...], ...] = ()        # in both dtypes


# Of [B, T, C] scans: a length off the block and one of a single step, a width off the tile and one of two tiles.
GPU_SCAN = dict(gpu_kernels=("pallas_triton", "pallas_mosaic_gpu"), gpu_cases=(((1, 19, 5), "bfloat16"),),
                slow_gpu_sizes=((3, 1, 33), (1, 37, 130), (1, 70, 128), (2, 16, 3)))

# Of matrix states: a length off the groups of steps, one of a single step, several spans between saved states.
GPU_STATES = dict(gpu_kernels=("pallas_triton",), gpu_cases=(((2, 13, 3, 5, 4), "bfloat16"),),
                  slow_gpu_sizes=((2, 13, 3, 5, 4), (3, 1, 2, 4, 7), (1, 150, 1, 16, 33), (1, 70, 1, 64, 64)))


def linear_scan_inputs(rng: np.random.Generator, batch: int, time: int, width: int) -> dict:
    reset = rng.random((batch, time)) < 0.1
    return dict(a=rng.random((batch, time, width)), b=rng.normal(size=(batch, time, width)),
                h0=rng.normal(size=(batch, width)), reset=reset)


def without_reset(make: Callable) -> Callable:
    return lambda rng, *size: {name: x for name, x in make(rng, *size).items() if name != "reset"}


def linear_scan_oracle(a, b, h0, reset=None):
    h, out = np.array(h0, np.float64), np.zeros(b.shape)
    for t in range(a.shape[1]):
        for row in np.flatnonzero(reset[:, t]) if reset is not None else ():
            h[row] = 0
        h = a[:, t] * h + b[:, t]
        out[:, t] = h
    return out, h


def gates_inputs(*names: str) -> Callable:
    """Pre-activations of both signs, some of them so large that their exponentials overflow."""
    def make(rng: np.random.Generator, batch: int, time: int, width: int) -> dict:
        draw = lambda: rng.normal(size=(batch, time, width)) * np.where(rng.random((batch, time, width)) < 0.05, 300, 2)
        return {name: draw() for name in names} | dict(h0=rng.normal(size=(batch, width)),
                                                       reset=rng.random((batch, time)) < 0.1)

    return make


def positive(x):
    return np.where(x >= 0, x + 0.5, 1 / (1 + np.exp(-np.clip(x, -700, 0))))


def min_gru_oracle(hidden, gate, h0, reset):
    gate = np.clip(gate, -700, 700)
    return linear_scan_oracle(1 / (1 + np.exp(gate)), positive(hidden) / (1 + np.exp(-gate)), h0, reset)


def min_lstm_oracle(hidden, forget, take, h0, reset):
    """f / (f + i) by logarithms of 1 + exp."""
    log_f, log_i = -np.logaddexp(0, -forget), -np.logaddexp(0, -take)
    both = np.logaddexp(log_f, log_i)
    return linear_scan_oracle(np.exp(log_f - both), np.exp(log_i - both) * positive(hidden), h0, reset)


def wkv6_inputs(rng: np.random.Generator, batch: int, time: int, heads: int, keys: int, values: int) -> dict:
    """Decays from 1e-40 to 0.9999."""
    narrow = lambda width: rng.normal(size=(batch, time, heads, width))
    return dict(r=narrow(keys), w=-np.exp(rng.uniform(-9, 4.5, (batch, time, heads, keys))), k=narrow(keys),
                v=narrow(values), u=rng.normal(size=(batch, heads, keys)),
                state=rng.normal(size=(batch, heads, keys, values)), reset=rng.random((batch, time)) < 0.1)


def wkv6_oracle(r, w, k, v, u, state, reset):
    state, y = np.array(state, np.float64), np.zeros(v.shape)
    for i, t, h in np.ndindex(*v.shape[:3]):
        if reset[i, t]:
            state[i, h] = 0
        now = np.outer(k[i, t, h], v[i, t, h])
        y[i, t, h] = (state[i, h] + np.diag(u[i, h]) @ now).T @ r[i, t, h]
        state[i, h] = np.diag(np.exp(w[i, t, h])) @ state[i, h] + now
    return y, state


def wkv7_inputs(rng: np.random.Generator, batch: int, time: int, heads: int, keys: int, values: int) -> dict:
    """As RWKV-7 makes them, with decays from 1e-40 to 0.9999."""
    given = wkv6_inputs(rng, batch, time, heads, keys, values)
    del given["u"]
    kappa = rng.normal(size=given["k"].shape)
    kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    return given | dict(a=-kappa, b=kappa * rng.random(kappa.shape))


def wkv7_oracle(r, w, k, v, a, b, state, reset):
    """With the state transposed, values along its rows, as RWKV-7 is written."""
    state, y = np.swapaxes(np.array(state, np.float64), -1, -2), np.zeros(v.shape)
    for i, t, h in np.ndindex(*v.shape[:3]):
        if reset[i, t]:
            state[i, h] = 0
        before = state[i, h]
        state[i, h] = (before @ np.diag(np.exp(w[i, t, h])) + np.outer(before @ a[i, t, h], b[i, t, h])
                       + np.outer(v[i, t, h], k[i, t, h]))
        y[i, t, h] = state[i, h] @ r[i, t, h]
    return y, np.swapaxes(state, -1, -2)


@functools.wraps(product_key_topk)
def best_16(q1, q2, c1, c2, *, implementation=None):
    """The scores alone, as ids have no gradient, and in the inputs' dtype."""
    return product_key_topk(q1, q2, c1, c2, 16, implementation=implementation)[0].astype(q1.dtype)


def product_key_inputs(rng: np.random.Generator, batch: int, time: int, heads: int, keys: int, width: int) -> dict:
    queries, sub_keys = (batch, time, heads, width), (keys, width)
    shapes = dict(q1=queries, q2=queries, c1=sub_keys, c2=sub_keys)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def best_16_oracle(q1, q2, c1, c2):
    out = np.zeros((*q1.shape[:3], 16))
    for where in np.ndindex(*q1.shape[:3]):
        sums = [a @ q1[where] + b @ q2[where] for a in c1 for b in c2]
        out[where] = sorted(sums, reverse=True)[:16]
    return out


@functools.wraps(peer_experts)
def gelu_experts(x, ids, gates, table, *, implementation=None):
    return peer_experts(x, ids, gates, table, activation=jax.nn.gelu, implementation=implementation)


def peer_inputs(rng: np.random.Generator, batch: int, time: int, heads: int, chosen: int, experts: int, kinds: int,
                width: int) -> dict:
    """Some ids are none, and with few experts some are chosen several times by a token."""
    ids = rng.integers(-1, experts, (batch, time, heads, chosen)).astype(np.int32)
    return dict(x=rng.normal(size=(batch, time, width)), ids=ids, gates=rng.normal(size=ids.shape),
                table=rng.normal(size=(experts, kinds, width)) / np.sqrt(width))


def gelu_experts_oracle(x, ids, gates, table):
    y = np.zeros(x.shape)
    for b, t, h, j in np.ndindex(*ids.shape):
        if ids[b, t, h, j] < 0:
            continue
        down, up, *gate = table[ids[b, t, h, j]]
        inner = down @ x[b, t]
        hidden = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner ** 3)))
        for row in gate:
            hidden *= row @ x[b, t]
        y[b, t] += gates[b, t, h, j] * hidden * up
    return y


def wkv4_inputs(rng: np.random.Generator, batch: int, time: int, width: int) -> dict:
    state = np.stack([rng.normal(size=(batch, width)), rng.normal(size=(batch, width))], axis=1)
    return dict(w=np.exp(rng.normal(size=width)), u=rng.normal(size=width), k=2 * rng.normal(size=(batch, time, width)),
                v=rng.normal(size=(batch, time, width)), state=state, reset=rng.random((batch, time)) < 0.1)


def wkv4_oracle(w, u, k, v, state, reset):
    """The sums as they stand, with no running maximum."""
    total, weighted = np.exp(state[:, 1]), np.exp(state[:, 1]) * state[:, 0]
    out = np.zeros(v.shape)
    for t in range(k.shape[1]):
        for row in np.flatnonzero(reset[:, t]):
            total[row] = weighted[row] = 0
        now, newest = np.exp(k[:, t]), np.exp(u + k[:, t])
        out[:, t] = (weighted + newest * v[:, t]) / (total + newest)
        total, weighted = np.exp(-w) * total + now, np.exp(-w) * weighted + now * v[:, t]
    return out, np.stack([weighted / total, np.log(total)], axis=1)


ROWS = [
    Row("linear_scan", linear_scan, linear_scan_oracle, linear_scan_inputs,
        sizes=((2, 13, 5), (3, 1, 4), (1, 8, 3), (2, 64, 1)),
        kernels=("pallas_tpu",), kernel_cases=(((2, 7, 5), "float32"),),
        slow_kernel_sizes=((2, 7, 5), (3, 1, 130), (1, 16, 520), (2, 128, 128), (9, 33, 1), (1, 523, 130)),
        full_size=(8, 2048, 2048), scan=Scan(time=("a", "b", "reset"), state="h0"), narrow=("a", "b"), **GPU_SCAN),
    Row("linear_scan_without_reset", linear_scan, linear_scan_oracle, without_reset(linear_scan_inputs),
        sizes=((2, 13, 5),), kernels=("pallas_tpu",), kernel_cases=(),
        slow_kernel_sizes=((3, 1, 130), (1, 523, 130)), full_size=(8, 2048, 2048),
        scan=Scan(time=("a", "b"), state="h0", reset=None), narrow=("a", "b"), **GPU_SCAN),
    Row("min_gru", min_gru, min_gru_oracle, gates_inputs("hidden", "gate"),
        sizes=((2, 13, 5), (3, 1, 4)), kernels=("pallas_tpu",), kernel_cases=(((2, 7, 5), "float32"),),
        slow_kernel_sizes=((1, 523, 130), (9, 33, 257)), full_size=(8, 2048, 2048),
        scan=Scan(time=("hidden", "gate", "reset"), state="h0"), narrow=("hidden", "gate"), **GPU_SCAN),
    Row("min_lstm", min_lstm, min_lstm_oracle, gates_inputs("hidden", "forget", "take"), sizes=((1, 9, 3),),
        kernels=("pallas_tpu",), kernel_cases=(((1, 37, 130), "bfloat16"),),
        slow_kernel_sizes=((2, 7, 5), (1, 523, 257)), full_size=(8, 2048, 2048),
        scan=Scan(time=("hidden", "forget", "take", "reset"), state="h0"), narrow=("hidden", "forget", "take"),
        **GPU_SCAN),
    Row("wkv6", wkv6, wkv6_oracle, wkv6_inputs,
        sizes=((2, 19, 3, 5, 4), (3, 1, 2, 4, 7)),
        kernels=("pallas_tpu",), kernel_cases=(((1, 70, 2, 5, 4), "float32"),),
        slow_kernel_sizes=((2, 13, 3, 5, 4), (3, 1, 1, 64, 64), (1, 270, 1, 70, 64), (1, 300, 4, 64, 64)),
        full_size=(8, 2048, 32, 64, 64),
        scan=Scan(time=("r", "w", "k", "v", "reset"), state="state"), narrow=("r", "k", "v"),
        **GPU_STATES),
    Row("wkv7", wkv7, wkv7_oracle, wkv7_inputs,
        sizes=((2, 19, 3, 5, 4), (3, 1, 2, 4, 7)),
        kernels=("pallas_tpu",), kernel_cases=(((1, 70, 2, 5, 4), "float32"),),
        slow_kernel_sizes=((2, 13, 3, 5, 4), (3, 1, 1, 64, 64), (1, 270, 1, 70, 64), (1, 300, 4, 64, 64)),
        full_size=(8, 2048, 32, 64, 64),
        scan=Scan(time=("r", "w", "k", "v", "a", "b", "reset"), state="state"), narrow=("r", "k", "v", "a", "b"),
        **GPU_STATES),
    Row("product_key_topk", best_16, best_16_oracle, product_key_inputs,
        sizes=((1, 3, 2, 17, 4), (2, 5, 3, 17, 4), (1, 1, 1, 16, 1)), kernels=("pallas_tpu",),
        kernel_cases=(((1, 3, 2, 17, 4), "float32"),),
        slow_kernel_sizes=((1, 1, 1, 16, 1), (1, 3, 2, 17, 4), (2, 35, 2, 70, 5), (1, 131, 1, 17, 130)),
        full_size=(8, 2048, 8, 1024, 128), narrow=("q1", "q2", "c1", "c2"),
        gpu_kernels=("pallas_triton", "pallas_mosaic_gpu"), gpu_cases=(((1, 3, 2, 17, 4), "bfloat16"),),
        slow_gpu_sizes=((1, 1, 1, 16, 1), (1, 3, 2, 17, 4), (1, 5, 2, 70, 5), (1, 131, 1, 17, 130))),
    Row("product_key_topk_of_whole_lanes", best_16, best_16_oracle, product_key_inputs, sizes=((1, 5, 2, 17, 16),),
        kernels=(), kernel_cases=(), slow_kernel_sizes=(), full_size=(8, 2048, 8, 1024, 128),
        narrow=("q1", "q2", "c1", "c2")),
    Row("peer_experts", gelu_experts, gelu_experts_oracle, peer_inputs,
        sizes=((1, 5, 6, 4, 49, 2, 7), (2, 1, 1, 3, 5, 3, 8), (3, 4, 2, 1, 1, 2, 1)), kernels=("pallas_tpu",),
        kernel_cases=(((1, 3, 1, 3, 5, 2, 512), "float32"),),
        slow_kernel_sizes=((2, 1, 1, 2, 3, 2, 512), (2, 9, 3, 5, 7, 2, 1024), (1, 17, 1, 1, 3, 2, 4096),
                           (1, 131, 1, 2, 400, 2, 512)),
        full_size=(8, 2048, 8, 16, 2 ** 18, 2, 1024), narrow=("x", "table"),
        gpu_kernels=("pallas_triton", "pallas_mosaic_gpu"),
        gpu_cases=(((1, 3, 1, 3, 5, 2, 128), "bfloat16"),),
        slow_gpu_sizes=((2, 9, 3, 5, 7, 2, 1024), (1, 17, 1, 1, 3, 2, 4096), (1, 31, 1, 2, 400, 2, 512))),
    # Widths that CPUs read where they lie: a group of rows and a rest, chunks of tokens and columns with a rest.
    Row("peer_experts_of_whole_lanes", gelu_experts, gelu_experts_oracle, peer_inputs,
        sizes=((1, 5, 6, 3, 49, 2, 16), (2, 35, 2, 3, 7, 3, 272)), kernels=(), kernel_cases=(), slow_kernel_sizes=(),
        full_size=(8, 2048, 8, 16, 2 ** 18, 2, 1024), narrow=("x", "table")),
    Row("wkv4", wkv4, wkv4_oracle, wkv4_inputs,
        sizes=((3, 13, 5), (4, 1, 3), (1, 70, 3)), kernels=("pallas_tpu",), kernel_cases=(((1, 19, 5), "bfloat16"),),
        slow_kernel_sizes=((2, 7, 5), (3, 1, 130), (1, 140, 1100), (9, 33, 1)), full_size=(8, 1024, 2048),
        scan=Scan(time=("k", "v", "reset"), state="state"), narrow=("k", "v"), **GPU_SCAN),
]
