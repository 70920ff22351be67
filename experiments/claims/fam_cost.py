"""What rows of growing length cost with block sliding-window attention and feedback memory.

Claim: FLOPs, memory and time of a training step grow linearly with the length of its rows for block sliding-window
    attention and TransformerFAM, whose state for decoding stays as large as it is; attention's FLOPs grow faster, and
    its state with the length.
Command: lm claim fam_cost --workdir runs/claims/fam_cost
Hardware: 2 CPU cores.
Expected: by counting, FLOPs a token are constant but for the first blocks, and the state is two blocks of keys and
    values and the memory. Nothing had been timed before the grid was committed. The slope of time has a wider limit
    than those of counted numbers, since short rows pay for calls.

Two layers of width 64, float32, one row, blocks of 64 with one block of memory and 8 slots; loss and gradient. A slope
is that of log cost over log length, fitted by least squares over lengths and seeds; 1 is linear. A seed is another
process.
"""

from math import log

from ml_collections import ConfigDict

from experiments.claims import base

LENGTHS = (1024, 4096, 8192)
COUNTED_SLOPE, TIMED_SLOPE, ATTENTION_SLOPE = 1.03, 1.15, 1.2
FIELDS = dict(num_heads=2, block=64, memory=1)
ARMS = {"attention": dict(num_heads=2), "bswa": FIELDS, "fam": dict(slots=8, **FIELDS)}


def get_config() -> ConfigDict:
    """The model is the arm's; `train.seq_len` is the length."""
    config = base.get_config()
    config.model = base.small(embed_dim=64, num_layers=2)
    config.data = dict(source="pydoc", tokenizer="bytes")
    return config


def grid(full: bool = False) -> list[dict]:
    """Every arm at every length, each alone on the machine; the long grid goes on to 32,768 tokens."""
    return [dict(arm=f"{arm}_{length}", seed=seed, measure="length_cost", alone=True, set={
        "model": base.small(embed_dim=64, num_layers=2, pattern=(f"{arm}/mlp",), mlp=dict(), **{arm: fields}),
        "train.seq_len": length})
        for arm, fields in ARMS.items() for length in (*LENGTHS, *((32_768,) if full else ())) for seed in base.SEEDS]


def slope(found: dict[int, list[float]]) -> float:
    """Least-squares slope of log cost over log length."""
    points = [(log(length), log(value)) for length, values in found.items() for value in values]
    x, y = base.mean([p[0] for p in points]), base.mean([p[1] for p in points])
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def check(results: list[dict]) -> dict:
    """Slopes of what is counted by tight limits, of time by a wide one; bytes of state exactly."""
    metrics = ("flops", "temporary_bytes", "seconds", "state_bytes")
    lengths = sorted({int(result["arm"].rsplit("_", 1)[1]) for result in results})
    criteria, series = [], {}
    for arm in ARMS:
        cost = {name: {length: base.by_arm(results, name)[f"{arm}_{length}"] for length in lengths} for name in metrics}
        state = cost["state_bytes"]
        grown = max(max(values) for values in state.values()) / min(min(values) for values in state.values())
        if arm == "attention":
            criteria += [base.at_least("attention, slope of FLOPs", slope(cost["flops"]), ATTENTION_SLOPE),
                         base.at_least("attention, bytes of state at the ends, ratio", min(state[lengths[-1]])
                                       / max(state[lengths[0]]), 0.9 * lengths[-1] / lengths[0])]
        else:
            criteria += [base.at_most(f"{arm}, slope of FLOPs", slope(cost["flops"]), COUNTED_SLOPE),
                         base.at_most(f"{arm}, slope of bytes of temporaries", slope(cost["temporary_bytes"]),
                                      COUNTED_SLOPE),
                         base.at_most(f"{arm}, slope of time", slope(cost["seconds"]), TIMED_SLOPE),
                         base.at_most(f"{arm}, largest over least bytes of state", grown, 1.0)]
        series[arm] = {"x": lengths, "y": [[1e3 * t for t in cost["seconds"][length]] for length in lengths]}
    figure = {"x": "tokens of a row", "y": "milliseconds a step", "xscale": "log", "yscale": "log", "series": series}
    return base.verdict(criteria, metrics, figure)
