"""`lm bench lengths`: a train step of RWKV-4 and of our own transformer of the same width, over rows of growing length.

A step has the same number of tokens at every length, so that the products are of one size and a time that grows
linearly with the length is a constant step. Both are processes that take turns, as in `launch.bench.train`.
"""

import argparse
import contextlib
import math
import os
import platform
import statistics
import time
from typing import Any

from launch.bench.publish import publish
from launch.bench.train import side

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
TOKENS = 8192
TURN = 2
KINDS = {"rwkv4": "launch.bench.rwkv4", "transformer": "launch.bench.transformer"}


def run(args: argparse.Namespace) -> int:
    """Measures every length, prints and writes the table."""
    lengths = sorted(args.seq_len or LENGTHS)
    if not all(1 <= length <= TOKENS and TOKENS % length == 0 for length in lengths):
        raise ValueError(f"--seq-len must divide the {TOKENS} tokens of a step; got {lengths}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    result = {"when": time.strftime("%Y-%m-%d"), "python": platform.python_version(),
              "cores": len(os.sched_getaffinity(0)), "rows": [measure(length, args.steps) for length in lengths]}
    return publish(args.out, "lengths", result, markdown(result))


def measure(length: int, steps: int) -> dict[str, Any]:
    """One length: at least `steps` steps of each model, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in KINDS}
    with contextlib.ExitStack() as opened:
        sides = {name: opened.enter_context(side("launch.bench.jax_side", module, str(length), "",
                                                 str(TOKENS // length))) for name, module in KINDS.items()}
        while len(seconds["rwkv4"]) < steps:
            for name, one in sides.items():
                one.ask("warm 1")
                seconds[name] += one.ask(f"time {TURN}")["seconds"]
        facts = {name: one.ask("report") for name, one in sides.items()}
    return {"length": length, "seconds": seconds, "facts": facts}


def crossing(lengths: list[int], ratios: list[float]) -> float | None:
    """The length from which the ratio stays above 1, between the last below and the next on logarithms; None where it
    is below 1 at the end, and the first length where it always is above."""
    below = [n for n, ratio in enumerate(ratios) if ratio <= 1]
    if not below:
        return float(lengths[0])
    n = below[-1]
    if n == len(ratios) - 1:
        return None
    low, high = math.log(ratios[n]), math.log(ratios[n + 1])
    return math.exp(math.log(lengths[n]) + (math.log(lengths[n + 1]) - math.log(lengths[n])) * -low / (high - low))


def markdown(result: dict[str, Any]) -> str:
    """The table of a result, and where the two cross."""
    from launch.bench import sizes
    rows = result["rows"]
    lines = [f"One training step of {TOKENS:,} tokens (forward, backward, AdamW), float32, {result['cores']} CPU "
             f"cores, width {sizes.WIDTH}, {sizes.LAYERS} layers; Python {result['python']}, "
             f"{rows[0]['facts']['rwkv4']['version']}. Medians of {len(rows[0]['seconds']['rwkv4'])} steps of each, in "
             f"turns of {TURN}. Parameters: RWKV-4 {rows[0]['facts']['rwkv4']['parameters']:,}, transformer "
             f"{rows[0]['facts']['transformer']['parameters']:,}.", "",
             "| T | rows | RWKV-4, ms | transformer, ms | transformer / RWKV-4 |", "|---|---|---|---|---|"]
    ratios = []
    for row in rows:
        ours, other = (1e3 * statistics.median(row["seconds"][name]) for name in KINDS)
        ratios.append(other / ours)
        lines.append(f"| {row['length']:,} | {TOKENS // row['length']} | {ours:.0f} | {other:.0f} | {ratios[-1]:.2f} |")
    at = crossing([row["length"] for row in rows], ratios)
    lines += ["", "RWKV-4's step is the longer one at every length." if at is None else
              f"RWKV-4's step is the shorter one from T = {at:,.0f} on."]
    return "\n".join(lines) + "\n"
