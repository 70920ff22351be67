"""`lm bench sweep`: several small models in one program against one after the other, by width and number of models.

The steps are those of `lm train` and of `lm sweep --vmap`, which spreads the models over one device a core and tries
both ways of a program. All are programs of one process that take turns, as where a sweep chooses. Cores in use are the
process's CPU time over the time that passed; the share of GEMM peak is that of a model alone.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

from launch.bench.publish import publish
from launch.sweeps.group_process import FASTER

WIDTHS = (16, 64, 256)
COUNTS = (1, 2, 4, 8, 16)
EXPERIMENT = "experiments/quickstart.py"
BATCH, TOKENS = 4, 32


def run(args: argparse.Namespace) -> int:
    """Measures every width and number, prints and writes the table."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from launch.sweeps.group_process import a_device_a_core
    a_device_a_core()
    import jax

    from launch.bench.train import gemm_peak
    peak = gemm_peak()
    corpora, rows = None, []
    for seq_len in args.seq_len or [TOKENS]:
        for width in args.width or WIDTHS:
            row, corpora = measure(width, seq_len, args.steps, peak, corpora)
            rows.append(row)
    result = {"when": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "jax": jax.__version__,
              "cores": len(os.sched_getaffinity(0)), "gemm_gflops": peak, "rounds": args.steps,
              "rows": rows}
    return publish(args.out, "sweep", result, markdown(result))


def measure(width: int, seq_len: int, rounds: int, peak: float, corpora: Any) -> tuple[dict[str, Any], Any]:
    """(one width: the medians of every number of models; the corpora, to be given to the next)."""
    import jax

    from launch import config as configs
    from launch.train import prepare
    from lm.train.group_speed import step_times
    overrides = [("model.embed_dim", width), ("train.batch_size", BATCH), ("train.seq_len", seq_len),
                 ("optimizer.name", "adamw"), ("eval.samples", ())]
    devices = jax.devices()
    prepared = prepare(configs.load(EXPERIMENT, overrides), corpora, devices[:1])
    experiment = prepared.experiment("")
    flops = 3 * experiment.flops_per_token * BATCH * seq_len
    found: dict[str, Any] = {"width": width, "seq_len": seq_len, "flops": flops, "counts": []}
    for count in COUNTS:
        times = step_times([experiment] * count, prepared.options, prepared.mesh, devices, rounds)
        found["counts"].append({
            "models": count, "alone": statistics.median(times.alone) / count, "way": times.way, "ratio": times.ratio,
            "chosen": times.ratio >= FASTER, "cores": times.cores,
            "together": {way: statistics.median(seconds) / count for way, seconds in times.together.items()}})
    found["cores"] = statistics.median(each["cores"]["alone"] for each in found["counts"])
    found["share"] = flops / statistics.median(each["alone"] for each in found["counts"]) / 1e9 / peak
    return found, prepared.corpora


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    head = " | ".join(f"{count} model{'s' * (count > 1)}" for count in COUNTS)
    lines = [f"One training step of quickstart's transformer with AdamW, float32, batches of {BATCH} rows, "
             f"{result['cores']} CPU cores; Python {result['python']}, jax {result['jax']}. GEMM peak measured: "
             f"{result['gemm_gflops']:.0f} GFLOP/s. Throughput in one program over that one after the other, medians "
             f"of {result['rounds']} turns, the faster way of a device with several models, and in brackets "
             f"milliseconds a model: alone, together.", "",
             f"| T | width | share of GEMM peak of one model | cores that it uses | {head} |",
             f"|{'---|' * (len(COUNTS) + 4)}"]
    for row in result["rows"]:
        lines.append(f"| {row['seq_len']} | {row['width']} | {row['share']:.0%} | {row['cores']:.2f} | "
                     f"{' | '.join(cells(row['counts']))} |")
    below = [row for row in result["rows"] if row["share"] < 0.3]
    reached = [row for row in below if max(each["ratio"] for each in row["counts"]) >= 2]
    lines += ["", f"Of {len(below)} with a share under 30%, {len(reached)} reach 2 times with some number of models. "
                  f"Where it is under {FASTER} times, `lm sweep` trains one after the other."]
    return "\n".join(lines) + "\n"


def cells(counts: Sequence[dict[str, Any]]) -> list[str]:
    """One cell for every number of models."""
    return [f"{each['ratio']:.2f}x {each['way']} ({1e3 * each['alone']:.2f}, {1e3 * each['together'][each['way']]:.2f})"
            for each in counts]
