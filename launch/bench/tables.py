"""`lm bench tables`: a train step of PEER as its table grows, with its rows updated alone and with all of them densely.

The measure is that of the claim `peer_flat_cost`, with its config; each size is a process's worth of memory at a time.
"""

import argparse
import os
import platform
import time
from typing import Any

from launch.bench.publish import publish

SIDES = (128, 256, 512, 1024)
MEASURED = {"rows": "gather, scatter, optimizer", "layer": "layer", "step": "train step", "dense": "train step, dense"}


def run(args: argparse.Namespace) -> int:
    """Measures every size, prints and writes the table."""
    if args.seq_len:
        raise ValueError("lm bench tables has rows of 32 tokens; --seq-len is for train, rwkv4, min_gru, lengths and "
                         "generate")
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from launch import config as configs
    from lm.claims.measures.table_cost import table_cost
    rows = []
    for side in SIDES:
        config = configs.load("experiments/claims/peer_flat_cost.py", [("model.peer.num_experts", side**2)])
        rows.append({"experts": side**2, **table_cost(config, rounds=args.steps)})
    result = {"when": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "jax": jax.__version__,
              "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0], "steps": args.steps, "rows": rows}
    return publish(args.out, "tables", result, markdown(result))


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    lines = [f"One PEER block of width 64, 32 tokens, 8 heads of 16, AdamW, float32, {result['cores']} CPU cores, load "
             f"average {result['load']:.1f} at the end; Python {result['python']}, jax {result['jax']}. Milliseconds, "
             f"medians of {result['steps']} turns with the same at 16,384 experts, and in brackets the median ratio to "
             "it; temporaries of the compiled step.", "",
             f"| experts | table, MiB | {' | '.join(MEASURED.values())} | temporaries, MiB | dense, MiB |",
             f"|{'---|' * (len(MEASURED) + 4)}"]
    for row in result["rows"]:
        times = " | ".join(f"{1e3 * row[f'{name}_seconds']:.1f} ({row[f'{name}_growth']:.2f})" for name in MEASURED)
        mib = [row[name] / 2**20 for name in ("table_bytes", "step_temporary_bytes", "dense_temporary_bytes")]
        lines.append(f"| {row['experts']:,} | {mib[0]:.0f} | {times} | {mib[1]:.1f} | {mib[2]:.1f} |")
    return "\n".join(lines) + "\n"
