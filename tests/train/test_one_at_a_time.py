"""Large steps on a CPU run one after the other: the same results, one program, and the memory of one step."""

import json
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.huge_pages import environment
from lm.train import one_at_a_time
from lm.train.one_at_a_time import OneAtATime, wait_until_freed

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads as Linux lists them")


def jitted():
    return jax.jit(lambda state, batch: (state + batch, {"train/loss": jnp.sum(state * batch)}), donate_argnums=0)


@LINUX
@pytest.mark.parametrize("large", [False, True])
def test_results_and_the_number_of_programs_are_those_of_the_step(monkeypatch, large):
    monkeypatch.setattr(one_at_a_time, "LARGE", -1 if large else 1 << 60)
    batch, compiled = jnp.arange(7.0), []
    expected, state = np.zeros(7), jnp.zeros(7)
    jax.block_until_ready((state, batch))
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None)
    try:
        step, losses = OneAtATime(jitted()), []
        for _ in range(5):
            state, metrics = step(state, batch)
            losses.append(metrics["train/loss"])
    finally:
        jax.monitoring.clear_event_listeners()
    assert step.large is large and len(compiled) == 1
    for loss in losses:
        assert float(loss) == (expected * np.arange(7)).sum()
        expected = expected + np.arange(7)
    np.testing.assert_array_equal(state, expected)


@LINUX
def test_a_large_step_is_dispatched_when_the_memory_of_the_last_is_free(monkeypatch):
    happened = []

    class Step:
        def __call__(self, state, batch):
            happened.append("step")
            return state, {"train/loss": jnp.float32(batch)}

    monkeypatch.setattr(one_at_a_time, "temporaries", lambda *_: one_at_a_time.LARGE)
    monkeypatch.setattr(one_at_a_time.jax, "block_until_ready", lambda of: of and happened.append(float(of[0])))
    monkeypatch.setattr(one_at_a_time, "wait_until_freed", lambda: happened.append("freed"))
    monkeypatch.setattr(one_at_a_time, "give_back", lambda: happened.append("given back"))
    step = OneAtATime(Step())
    for batch in range(5):
        step(None, batch)
    assert happened == ["given back", "step", 0.0, "freed", "given back", "step", 1.0, "freed", "given back", "step",
                        2.0, "freed", "step", 3.0, "freed", "step"]


def test_accelerators_get_their_steps_as_they_are(monkeypatch):
    monkeypatch.setattr(one_at_a_time, "platform", lambda: "tpu")
    step = OneAtATime(lambda state, batch: (state, batch))  # has nothing to lower or to wait for
    assert step(1, 2) == (1, 2) and not step.large


@LINUX
def test_threads_of_python_are_not_waited_for_and_those_of_xla_are():
    stop = threading.Event()
    spinning = threading.Thread(target=lambda: [None for _ in iter(stop.is_set, True)])
    spinning.start()
    try:
        assert wait_until_freed(30.0)
        work = jax.jit(lambda x: jax.lax.fori_loop(0, 3000, lambda _, y: jnp.tanh(y @ x), x))
        x = jnp.full((256, 256), 1e-3)
        jax.block_until_ready(work(x))
        result = work(x)
        time.sleep(0.01)
        waited = wait_until_freed(0.0)
        assert not waited or result.is_ready()
        jax.block_until_ready(result)
        assert wait_until_freed(30.0)
    finally:
        stop.set()
        spinning.join()


MEMORY = """
import json, resource
import jax, jax.numpy as jnp
from lm.train.one_at_a_time import OneAtATime, temporaries
from launch.bench.side import peak_mib, resident_mib

def step(state, batch):
    wide = jnp.tanh(state[:, None] * batch)          # 256 MiB
    after = state + 1e-3 * (wide @ state) / (1e-6 + jnp.abs(jnp.tanh(wide.T @ state)).sum())
    return after, {"train/loss": after.sum(), "train/other": after.min()}

fn = jax.jit(step, donate_argnums=0)
state, batch = jnp.ones(8192), jnp.linspace(0, 1, 8192)
size = temporaries(fn, state, batch) / 2**20
run, before = OneAtATime(fn), resident_mib()
for _ in range(10):
    state, metrics = run(state, batch)
print(json.dumps([size, float(metrics["train/loss"]) and peak_mib() - before]))
"""


@LINUX
@pytest.mark.slow
def test_the_memory_of_one_step_serves_all():
    """Without it the peak of ten steps is that of two to four on most runs."""
    ran = subprocess.run([sys.executable, "-c", MEMORY], env=environment("train", {"JAX_PLATFORMS": "cpu"}),
                         capture_output=True, text=True, timeout=300, check=True)
    size, grew = json.loads(ran.stdout)
    assert size > 200
    assert grew < 1.5 * size, f"{grew:.0f} MiB for a step with {size:.0f} MiB of temporaries"
