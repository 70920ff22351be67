"""`lm plan --target cpu --measure`: how far a plan is from what happens, on the one machine that is here.

    python -m launch.planning.measured FILE.json     the running process; FILE is what the plan was compiled from

Planned time is that of a roofline whose peak and bandwidth are measured just before; planned memory is the compiler's.
"""

import ctypes
import json
import pathlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from launch.kernels import process
from launch.planning.planned import Plan, Setting

SIDE, COPY = 2048, 2**26     # of the matrix product, and numbers of the copy, that peaks are measured with
STEPS, WARM = 5, 2


def measure(config: Any, plan: Plan, setting: Setting) -> str:
    """Planned and measured memory and time of a step, as text."""
    from launch.planning.ask import ask
    from lm.data.tokenizer import special_ids
    if plan.numbers is None:
        return "nothing is measured of a step that did not compile"
    asked = ask(config, setting.machine, vocab_size=setting.tokenizer.vocab_size,
                special=special_ids(setting.tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "step.json"
        file.write_text(json.dumps(asked))
        found = process.answer([setting.python, "-m", "launch.planning.measured", str(file)], process.environment(),
                               setting.limit)
    if found["status"] != "ok":
        return f"measuring: {found['status']}: {found['reason']}"
    planned = sum(times * max(flops / found["peak"], moved / found["bandwidth"])
                  for times, flops, moved in plan.numbers["pairs"])
    need = plan.numbers["total"] - plan.numbers["memory"]["generated"]
    return "\n".join([
        f"measured here: matrix products of float32 {found['peak'] / 1e9:.1f} GFLOP/s, copies "
        f"{found['bandwidth'] / 1e9:.1f} GB/s",
        f"  memory planned {need / 2**20:.1f} MiB, resident memory grew by {found['memory'] / 2**20:.1f} MiB: "
        f"{found['memory'] / need:.2f} of the plan",
        f"  step planned at least {1000 * planned:.1f} ms, median of {STEPS}: {1000 * found['seconds']:.1f} ms: "
        f"{found['seconds'] / planned:.2f} of the bound"])


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """seconds of a step, memory that it needs, and peaks of this machine."""
    import jax
    import numpy as np

    from launch.planning.program import optimizer_of, train_step
    from launch.recipe import recipe_of
    from lm.core.batch import Batch
    from lm.core.fields import build
    from lm.core.sharding import make_mesh
    from lm.models.build import build_model
    from lm.train.options import TrainOptions
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        step = train_step(asked, mesh).traced.lower().compile()
    train = build(TrainOptions, asked["train"], "config.train")
    recipe = recipe_of(build_model(asked["model"], asked["vocab_size"]), train, optimizer_of(asked), asked["loss"])
    create = jax.jit(recipe.fresh, out_shardings=recipe.shardings(mesh)).lower(0).compile()
    peak, bandwidth = peaks()
    ctypes.CDLL(None).malloc_trim(0)    # what compiling left
    before, most, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    state = create(0)
    rng, shape = np.random.default_rng(0), (train.batch_size, train.seq_len)
    tokens = rng.integers(0, asked["vocab_size"], shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = jax.device_put(Batch(tokens, tokens, np.ones(shape, np.float32), np.ones(shape, np.int32), positions))
    took = []
    for _ in range(WARM + STEPS):
        began = time.perf_counter()
        state, report = step(state, batch)
        jax.block_until_ready(report)
        took.append(time.perf_counter() - began)
    done.set()
    thread.join()
    return dict(status="ok", seconds=statistics.median(took[WARM:]), memory=most[0] - before, peak=peak,
                bandwidth=bandwidth)


def peaks() -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s of a large copy) of this machine, the best of a few."""
    import jax
    import jax.numpy as jnp
    product = jax.jit(lambda x: x @ x)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: pages that are new would cost more than the copy
    square, line = jnp.ones((SIDE, SIDE)), [jnp.ones((COPY,))]
    flops = 2 * SIDE**3 / _best(lambda: jax.block_until_ready(product(square)))

    def over() -> None:
        line[0] = jax.block_until_ready(copy(line[0]))

    return flops, 8 * COPY / _best(over)


def _best(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    print(json.dumps(run(json.loads(pathlib.Path(sys.argv[1]).read_text()))), flush=True)
