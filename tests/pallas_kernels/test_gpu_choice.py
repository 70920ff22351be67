"""Which GPU kernel runs is a matter of the compute capability, and said with the reasons."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.dispatch import choose, stated_platform
from pallas_kernels.gpu_testing import can_interpret, interpreted_gpu
from pallas_kernels.linear_scan import linear_scan
from pallas_kernels.linear_scan.api import IMPLEMENTATIONS


def checks(dtype="bfloat16"):
    return {"pallas_mosaic_gpu": functools.partial(gpu.no_mosaic, dtype),
            "pallas_triton": functools.partial(gpu.no_triton, dtype), "chunked": lambda platform: None}


@pytest.mark.parametrize(("capability", "name"), [
    ((7, 5), "chunked"), ((8, 0), "pallas_triton"), ((8, 9), "pallas_triton"), ((9, 0), "pallas_mosaic_gpu"),
    ((10, 0), "pallas_mosaic_gpu"), ((12, 0), "pallas_triton")])
def test_the_best_kernel_of_each_capability(capability, name):
    with gpu.stated_gpu(capability):
        assert choose("op", None, checks()) == name
        assert choose("op", None, checks("float64")) == "chunked"


def test_other_kernels_serve_by_name_or_say_why_not():
    with gpu.stated_gpu((9, 0)):
        assert choose("op", "pallas_triton", checks()) == "pallas_triton"
        with pytest.raises(ValueError, match="it takes float32 and bfloat16, not float16"):
            choose("op", "pallas_mosaic_gpu", checks("float16"))
    with gpu.stated_gpu((8, 6)), pytest.raises(ValueError, match=r"capability 9.x or 10.x and this GPU has 8\.6"):
        choose("op", "pallas_mosaic_gpu", checks())
    with gpu.stated_gpu((7, 0)), pytest.raises(ValueError, match=r"capability 8.0 or higher and this GPU has 7\.0"):
        choose("op", "pallas_triton", checks())


def test_a_gpu_that_is_not_known_has_no_kernel():
    with stated_platform("gpu"), pytest.raises(ValueError, match="compute capability of this one is not known"):
        choose("op", "pallas_triton", checks())
    assert choose("op", None, checks()) == "chunked"


def test_a_jax_without_triton_says_so(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    with gpu.stated_gpu((8, 0)), pytest.raises(ValueError, match="carries Pallas-Triton no longer"):
        choose("op", "pallas_triton", checks())


def test_gpu_kernels_are_refused_on_a_cpu_by_name():
    x = jnp.ones((1, 2, 3))
    for name in ("pallas_mosaic_gpu", "pallas_triton"):
        assert name in IMPLEMENTATIONS
        with pytest.raises(ValueError, match="it needs an NVIDIA GPU and this is cpu"):
            linear_scan(x, x, x[:, 0], implementation=name)


def test_words_hold_a_bit_a_step():
    reset = np.random.default_rng(0).random((3, 70)) < 0.3
    words = np.asarray(gpu.reset_words(jnp.asarray(reset)))
    assert words.shape == (3, 3) and words.dtype == np.int32
    for row, step in np.ndindex(*reset.shape):
        assert bool(words[row, step // 32] >> (step % 32) & 1) == reset[row, step]
    assert not (words[:, 2].view(np.uint32) >> 6).any()         # steps after the last reset nothing


if can_interpret("pallas_mosaic_gpu"):
    def test_the_race_detector_of_the_interpreter_works():
        """A block that is read before its copy has arrived."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        def racy(x_ref, y_ref, shared, barrier):
            plgpu.copy_gmem_to_smem(x_ref, shared, barrier)
            y_ref[...] = shared[...]
            plgpu.barrier_wait(barrier)

        x = jnp.ones(128)
        with pytest.raises(Exception, match="RACE DETECTED"), interpreted_gpu("pallas_mosaic_gpu"):
            jax.block_until_ready(plgpu.kernel(
                racy, out_type=x, scratch_types=[plgpu.SMEM((128,), jnp.float32), plgpu.Barrier()],
                **gpu.interpret_mosaic())(x))
