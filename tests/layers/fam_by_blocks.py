"""TransformerFAM as its paper writes it, block by block and one query at a time, in float64: the oracle of `test_fam`.

Legend: T tokens of one document, D embed_dim, f slots.
"""

import numpy as np


def rms(x, scale):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotated(x, positions, theta=10_000.0):
    """[n, H, K] at positions [n]."""
    half = x.shape[-1] // 2
    angle = np.asarray(positions)[:, None, None] * theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def attention(q, keys, values):
    """One query [H, K] to lists of keys and values [n, H, K]."""
    k, v = np.concatenate(keys), np.concatenate(values)
    scores = np.einsum("hk,nhk->hn", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hn,nhk->hk", weights / weights.sum(-1, keepdims=True), v).reshape(-1)


def hidden(layers, learned, x, *, block, memory, heads, slot_position="last", first_position=0, passed=None):
    """(x [T, D] after all layers, the memory of each layer after each whole block).

    layers: parameters of each, {"norm0": ..., "fam": ..., "norm1": ..., "mlp": ...}. learned: [f, D]. passed: a memory
    [f, D] of each layer that the document begins with in its place.
    """
    T, f, count = len(x), len(learned), len(layers)
    out = np.zeros_like(x)
    feedback, fresh = ([None] * count, True) if passed is None else (list(passed), False)
    ends = [first_position - 1] * count
    past = [[] for _ in layers]
    history = [[] for _ in layers]
    for start in range(0, T, block):
        stream = x[start:start + block]
        positions = first_position + np.arange(start, start + len(stream))
        flow = learned
        for n, layer in enumerate(layers):
            def project(rows, where, layer=layer):
                normed = rms(rows, layer["norm0"]["scale"])
                q, k, v = ((normed @ layer["fam"][name]["kernel"]).reshape(len(rows), heads, -1)
                           for name in ("query", "key", "value"))
                return rotated(q, where), rotated(k, where), v

            def feed_forward(rows, layer=layer):
                up = gelu(rms(rows, layer["norm1"]["scale"]) @ layer["mlp"]["up"]["kernel"])
                return rows + up @ layer["mlp"]["down"]["kernel"]

            first = feedback[n] is None
            before = flow if first else feedback[n]
            seen = n == 0 or not first
            q, k, v = project(stream, positions)
            if before is not None:
                where = ends[n] - f + 1 + np.arange(f)
                qf, kf, vf = project(before, where if slot_position == "last" else 0 * where)
            attended = np.zeros_like(stream)
            for t in range(len(stream)):
                keys = [k for k, _ in past[n][len(past[n]) - memory:]] if memory else []
                values = [v for _, v in past[n][len(past[n]) - memory:]] if memory else []
                if seen:
                    keys, values = [*keys, kf], [*values, vf]
                attended[t] = attention(q[t], [*keys, k[:t + 1]], [*values, v[:t + 1]]) @ layer["fam"]["out"]["kernel"]
            result = feed_forward(attended + stream)
            flow = None
            if len(stream) == block:
                added = np.stack([attention(row, [kf, k], [vf, v]) for row in qf]) @ layer["fam"]["out"]["kernel"]
                flow = feed_forward(added + (0 if first and fresh else before))
                feedback[n], ends[n] = flow, positions[-1]
                history[n].append(flow)
            past[n].append((k, v))
            stream = result
        out[start:start + block] = stream
    return out, history
