"""`lm bench orpo`: our ORPO step against that of TRL's trainer, the same model, weights and pairs, turn by turn.

TRL gets its best of one and of all threads, once with activations kept, which is its fastest, and once with activations
made again in the backward pass, which is its default and takes the least memory. Ours runs as by default, and with the
logits of a part of a row at a time, made again in the backward pass (`loss.chunk`).
"""

import argparse
import contextlib
import importlib.util
import os
import platform
import statistics
import tempfile
import time
from typing import Any

from launch.bench.publish import publish
from launch.bench.train import TURN, side, take_turns

SHAPES = (256, 512)
TRL, OURS = "launch.bench.orpo_trl_side", "launch.bench.orpo_side"


def run(args: argparse.Namespace) -> int:
    """Measures every shape, prints and writes the table."""
    if args.steps < 10:
        raise ValueError(f"--steps must be at least 10, for a median that means something; got {args.steps}")
    if min(args.seq_len or SHAPES) < 8 or args.vocab < 8:
        raise ValueError(f"--seq-len and --vocab must be at least 8; got {min(args.seq_len or SHAPES)} and "
                         f"{args.vocab}")
    for package, install in (("torch", "'loomlm[bench]' (a CPU build of torch will do)"), ("trl", "trl")):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"lm bench orpo compares with TRL's ORPOTrainer and {package} is not installed; install "
                             f"{install}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    cores = len(os.sched_getaffinity(0))
    result = {"when": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "cores": cores,
              "vocab": args.vocab,
              "shapes": [measure(seq_len, args.vocab, args.steps, cores) for seq_len in args.seq_len or SHAPES]}
    return publish(args.out, "orpo", result, markdown(result))


def measure(seq_len: int, vocab: int, steps: int, cores: int) -> dict[str, Any]:
    """One shape: the best number of threads for TRL, then the sides in turns."""
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "weights.npz")
        trl = lambda threads, how: side(TRL, str(seq_len), str(vocab), str(threads), how, weights)
        trials = {}
        for threads in sorted({1, cores}):
            with trl(threads, "kept") as opened:
                trials[threads] = statistics.median(opened.ask("time 3")["seconds"][1:])
        threads = min(trials, key=trials.get)
        with contextlib.ExitStack() as stack:
            sides = {"kept": stack.enter_context(trl(threads, "kept")),
                     "remade": stack.enter_context(trl(threads, "remade")),
                     "ours": stack.enter_context(side(OURS, str(seq_len), str(vocab), weights, "default")),
                     "chunked": stack.enter_context(side(OURS, str(seq_len), str(vocab), weights, "chunked"))}
            losses = {name: one.first_loss for name, one in sides.items()}
            if max(losses.values()) - min(losses.values()) > 1e-4:
                raise AssertionError(f"the sides differ in their initial loss: {losses}")
            times = take_turns(sides, steps, TURN)
            facts = {name: one.ask("report") for name, one in sides.items()}
    if len({fact["parameters"] for fact in facts.values()}) > 1:
        raise AssertionError(f"the sides differ in parameters: {facts}")
    return {"seq_len": seq_len, "steps": len(times["ours"]), "seconds": times, "facts": facts, "first_loss": losses,
            "trials": {f"{t} threads": s for t, s in trials.items()},
            "speed_ratio": {name: statistics.median(times["kept"]) / statistics.median(times[name])
                            for name in ("ours", "chunked")}}


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    from launch.bench import pairs, sizes
    facts = result["shapes"][0]["facts"]
    lines = [
        f"One ORPO step (forward, backward, AdamW) on {pairs.PAIRS} pairs of sequences of T tokens, half of them "
        f"prompt, float32, {result['cores']} CPU cores; GPT-2's architecture of width {sizes.WIDTH}, {sizes.LAYERS} "
        f"layers, vocabulary {result['vocab']:,}; Python {result['python']}, {facts['ours']['version']} against "
        f"{facts['kept']['version']}. Medians of as many steps of each side, in turns of {TURN}.", "",
        "| T | steps | TRL's threads | TRL, tokens/s | TRL, activations remade | loomlm | loomlm, logits in chunks | "
        "speed against TRL | in chunks | peak memory above imports, MiB: TRL | remade | loomlm | in chunks |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for shape in result["shapes"]:
        tokens = shape["facts"]["ours"]["tokens_per_step"]
        rate = {name: tokens / statistics.median(seconds) for name, seconds in shape["seconds"].items()}
        peak = {name: fact["peak_above_imports_mib"] for name, fact in shape["facts"].items()}
        lines.append(
            f"| {shape['seq_len']} | {shape['steps']} | {shape['facts']['kept']['threads']} | {rate['kept']:,.0f} | "
            f"{rate['remade']:,.0f} | {rate['ours']:,.0f} | {rate['chunked']:,.0f} | "
            f"{shape['speed_ratio']['ours']:.2f}x | {shape['speed_ratio']['chunked']:.2f}x | {peak['kept']:.0f} | "
            f"{peak['remade']:.0f} | {peak['ours']:.0f} | {peak['chunked']:.0f} |")
    return "\n".join(lines) + "\n"
