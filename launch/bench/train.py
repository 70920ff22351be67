"""`lm bench train`, `rwkv4` and `min_gru`: our train step against a package's model on the same cores, turn by turn.

Both sides are processes that hold their model. Only one of them works at a time; they take turns of a few steps, so
that a machine that slows down slows both. torch gets its best of one and of all threads and of its two AdamW, found
first. Both run with the memory settings of `launch.huge_pages`. Where a step of torch takes seconds, as a loop over
1,024 tokens in Python does, fewer are measured, and only one of the two AdamW, which then does not count.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

from launch.bench.publish import publish
from launch.compile_cache import VARIABLE

MODELS = {"train": "launch.bench.gpt2", "rwkv4": "launch.bench.rwkv4", "min_gru": "launch.bench.min_gru_model"}
SHAPES = (256, 1024)
TURN = 4  # measured steps a turn, after one that does not count
SLOW, FEW = 2.0, 3  # seconds from which a step of torch is slow, and how many of it are measured then, one a turn


class Side:
    """A process of `launch.bench.side`."""

    def __init__(self, module: str, *arguments: str):
        environ = {name: value for name, value in os.environ.items()
                   if name != VARIABLE}     # a cached program would hide what compiling costs in memory
        self.process = subprocess.Popen([sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, bufsize=1, env=environ)
        self.first_loss = self._answer()["first_loss"]

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"a side of the benchmark ended with exit code {self.process.wait()}; see above")
        return json.loads(line)

    def ask(self, line: str) -> dict[str, Any]:
        """One line of its protocol and the answer."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait(timeout=30)


@contextlib.contextmanager
def side(module: str, *arguments: str) -> Iterator[Side]:
    """A `Side` that is ended at the end."""
    opened = Side(module, *arguments)
    try:
        yield opened
    finally:
        opened.close()


def take_turns(sides: Mapping[str, Any], steps: int, turn: int) -> dict[str, list[float]]:
    """Seconds of at least `steps` steps of each side, `turn` of one and then of the next."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for one in sides.values():
        one.ask("warm 1")
    while min(map(len, times.values())) < steps:
        for name, one in sides.items():
            one.ask("warm 1")  # takes back the caches and pages that the other side had
            times[name] += one.ask(f"time {turn}")["seconds"]
    return times


def run(args: argparse.Namespace) -> int:
    """Measures every shape, prints and writes the table."""
    if args.steps < 10:
        raise ValueError(f"--steps must be at least 10, for a median that means something; got {args.steps}")
    if min(args.seq_len or SHAPES) < 1:
        raise ValueError(f"--seq-len must be at least 1; got {min(args.seq_len)}")
    kind = importlib.import_module(MODELS[args.what])
    for package, install in (("torch", "'loomlm[bench]' (a CPU build of torch will do)"), (kind.IMPORT, kind.PACKAGE)):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"lm bench {args.what} compares with PyTorch and {package} is not installed; install "
                             f"{install}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    cores = len(os.sched_getaffinity(0))
    result = {"when": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "cores": cores,
              "gemm_gflops": gemm_peak(),
              "shapes": [measure(MODELS[args.what], seq_len, args.steps, cores) for seq_len in args.seq_len or SHAPES]}
    return publish(args.out, args.what, result, markdown(result, kind.TITLE))


def measure(model: str, seq_len: int, steps: int, cores: int) -> dict[str, Any]:
    """One shape: torch's best setting, then both sides in turns."""
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "weights.npz")
        trials = {}
        for threads in sorted({1, cores}):
            for optimizer in ("fused", "foreach"):
                if optimizer == "foreach" and trials[threads, "fused"] > SLOW:
                    continue
                with side("launch.bench.torch_side", model, str(seq_len), str(threads), optimizer, weights) as torch:
                    first = torch.ask("time 1")["seconds"]
                    trials[threads, optimizer] = statistics.median(first if first[0] > SLOW else
                                                                   torch.ask("time 6")["seconds"][1:])
        threads, optimizer = min(trials, key=trials.get)
        steps, turn = (FEW, 1) if trials[threads, optimizer] > SLOW else (steps, TURN)
        with (side("launch.bench.torch_side", model, str(seq_len), str(threads), optimizer, weights) as torch,
              side("launch.bench.jax_side", model, str(seq_len), weights) as ours, contextlib.ExitStack() as opened):
            if abs(torch.first_loss - ours.first_loss) > 1e-4:
                raise AssertionError(f"the sides differ: initial loss {torch.first_loss} and {ours.first_loss}")
            others = {name: opened.enter_context(side("launch.bench.jax_side", module, str(seq_len), weights))
                      for name, module in importlib.import_module(model).VARIANTS.items()}
            sides = {"torch": torch, "ours": ours, **others}
            times = take_turns(sides, steps, turn)
            facts = {"torch": torch.ask("report"), "ours": ours.ask("report")}
    if facts["torch"]["parameters"] != facts["ours"]["parameters"]:
        raise AssertionError(f"the sides differ in parameters: {facts}")
    return {"seq_len": seq_len, "steps": len(times["ours"]), "seconds": times, "facts": facts,
            "first_loss": {"torch": torch.first_loss, "ours": ours.first_loss},
            "trials": {f"{t} threads, {o}": s for (t, o), s in trials.items()},
            "speed_ratio": statistics.median(times["torch"]) / statistics.median(times["ours"])}


def gemm_peak(size: int = 1024, repeats: int = 20) -> float:
    """GFLOP/s of a float32 matrix product in jax on all cores: the best of many."""
    code = (f"import jax, jax.numpy as jnp, time\na = jnp.ones(({size}, {size}))\nf = jax.jit(lambda a: a @ a)\n"
            f"f(a).block_until_ready()\nbest = 1e9\nfor _ in range({repeats}):\n    t = time.perf_counter()\n"
            f"    f(a).block_until_ready()\n    best = min(best, time.perf_counter() - t)\n"
            f"print(2 * {size}**3 / best / 1e9)")
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def markdown(result: dict[str, Any], title: str) -> str:
    """The table of a result; title: the other side's model."""
    from launch.bench import sizes
    facts = result["shapes"][0]["facts"]
    lines = [
        f"One training step (forward, backward, AdamW), float32, {result['cores']} CPU cores, batch {sizes.BATCH}, "
        f"width {sizes.WIDTH}, {sizes.LAYERS} layers, vocabulary {sizes.VOCAB}; Python {result['python']}, "
        f"{facts['ours']['version']} against {facts['torch']['version']} ({title}). Medians of as "
        f"many steps of each side, in turns of at most {TURN}. GEMM peak measured: {result['gemm_gflops']:.0f} "
        "GFLOP/s.", "",
        "| T | steps | torch's best setting | torch, ms | loomlm, ms | speed against torch | share of GEMM peak | "
        "peak memory above imports, torch, MiB | loomlm, MiB |", "|---|---|---|---|---|---|---|---|---|"]
    for shape in result["shapes"]:
        torch, ours = (statistics.median(shape["seconds"][name]) for name in ("torch", "ours"))
        share = shape["facts"]["ours"]["flops_per_step"] / ours / 1e9 / result["gemm_gflops"]
        lines.append(
            f"| {shape['seq_len']} | {shape['steps']} | {shape['facts']['torch']['threads']} threads, "
            f"{shape['facts']['torch']['optimizer']} | {1e3 * torch:.0f} | {1e3 * ours:.0f} | "
            f"{shape['speed_ratio']:.2f}x | {share:.0%} | {shape['facts']['torch']['peak_above_imports_mib']:.0f} | "
            f"{shape['facts']['ours']['peak_above_imports_mib']:.0f} |")
    for shape in result["shapes"]:
        for name in [name for name in shape["seconds"] if name not in ("torch", "ours")]:
            rest, ours = (statistics.median(shape["seconds"][which]) for which in (name, "ours"))
            share = 1 - rest / ours
            lines += ["", f"T {shape['seq_len']}, with {name}: {1e3 * rest:.0f} ms, so that takes {share:.0%} of it."]
    return "\n".join(lines) + "\n"
