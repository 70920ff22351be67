"""What one more token costs after a long context.

Claim: Bytes of state and time a generated token stay flat from 1,024 to 65,536 tokens of context for RWKV-4 and RWKV-7,
    and grow for attention with a key-value cache.
Command: lm claim rwkv_linear --workdir runs/claims/rwkv_linear
Hardware: 2 CPU cores.
Expected: nothing had been timed before the grid was committed. State by counting: keys and values of
    two layers of 128 floats are 2 KiB a token of cache, and RWKV does not grow. The first run was made on a machine
    with other work on it and failed: nine calls of a millisecond gave RWKV-4 a slope of -0.1002, with 0.24 to 3.4 times
    the time at the ends. Since then calls are repeated for two seconds; limits are as they were, and the second run,
    on the same busy machine, met them.

Two layers, width 128, float32, one row, weights as at initialisation: time does not depend on their values. A seed is
another process. The verdict rests on bytes, which are counted, and on the slope of log time over log context, fitted by
least squares over all lengths and seeds; the ratio of times between the ends is printed beside them.
"""

from math import log

from ml_collections import ConfigDict

from experiments.claims import base

LENGTHS = (1024, 4096, 16_384, 65_536)
FLAT_SLOPE, GROWING_SLOPE = 0.1, 0.3
RWKV = dict(norm="layer", embed_norm=True)

ARMS = {
    "attention": dict(pattern=("attention/mlp",), attention=dict(num_heads=2), mlp=dict()),
    "rwkv4": dict(**RWKV, pattern=("rwkv4/channel_mix",), channel_mix=dict()),
    "rwkv7": dict(**RWKV, prefix=("first/channel_mix",), pattern=("rwkv7/channel_mix",),
                  first=dict(kind="rwkv7", value_residual=False), rwkv7=dict(), channel_mix=dict(version=7)),
}


def get_config() -> ConfigDict:
    """The model is the arm's; `train.seq_len` is the context."""
    config = base.get_config()
    config.model = base.small(embed_dim=128, num_layers=2, **ARMS["attention"])
    config.data = dict(source="pydoc", tokenizer="bytes")
    return config


def grid(full: bool = False) -> list[dict]:
    """Every arm at every length, each alone on the machine; the long grid has eight times the width in four layers."""
    size = dict(embed_dim=1024, num_layers=4) if full else dict(embed_dim=128, num_layers=2)
    return [dict(arm=f"{arm}_{length}", seed=seed, measure="decode_cost", alone=True,
                 set={"model": base.small(**size, **model), "train.seq_len": length})
            for arm, model in ARMS.items() for length in LENGTHS for seed in base.SEEDS]


def slope(times: dict[int, list[float]]) -> float:
    """Least-squares slope of log time over log context."""
    points = [(log(length), log(seconds)) for length, found in times.items() for seconds in found]
    x, y = base.mean([p[0] for p in points]), base.mean([p[1] for p in points])
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def check(results: list[dict]) -> dict:
    """Bytes exactly, slopes by their limits; the ratio between the ends is a number without a limit."""
    seconds, state = base.by_arm(results, "seconds_per_token"), base.by_arm(results, "state_bytes")
    criteria, series = [], {}
    for arm in ARMS:
        times = {length: seconds[f"{arm}_{length}"] for length in LENGTHS}
        sizes = {length: state[f"{arm}_{length}"] for length in LENGTHS}
        first, last = LENGTHS[0], LENGTHS[-1]
        spread = [max(times[last]) / min(times[first]), min(times[last]) / max(times[first])]
        ratio = f"time at {last} over {first}: {spread[1]:.3g} to {spread[0]:.3g}"
        if arm == "attention":
            grown = min(sizes[last]) / max(sizes[first])
            criteria += [base.at_least("attention, bytes of state at the ends, ratio", grown, 0.9 * last / first),
                         base.at_least(f"attention, slope of time ({ratio})", slope(times), GROWING_SLOPE)]
        else:
            grown = max(max(found) for found in sizes.values()) / min(min(found) for found in sizes.values())
            criteria += [base.at_most(f"{arm}, largest over least bytes of state", grown, 1.0),
                         base.at_most(f"{arm}, slope of time ({ratio})", abs(slope(times)), FLAT_SLOPE)]
        series[arm] = {"x": list(LENGTHS), "y": [[1e6 * t for t in times[length]] for length in LENGTHS]}
    figure = {"x": "tokens of context", "y": "microseconds a token", "xscale": "log", "yscale": "log", "series": series}
    return base.verdict(criteria, ("seconds_per_token", "seconds_low", "seconds_high", "state_bytes"), figure)
