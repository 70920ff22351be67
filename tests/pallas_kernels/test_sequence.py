"""Recurrences with time split over devices equal those that are not split: values, states and all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.linear_scan import linear_scan, min_gru, min_lstm
from pallas_kernels.linear_scan.sequence import (
    linear_scan_over_sequence,
    min_gru_over_sequence,
    min_lstm_over_sequence,
)
from pallas_kernels.wkv4 import wkv4
from pallas_kernels.wkv4.sequence import wkv4_over_sequence
from pallas_kernels.wkv6 import wkv6
from pallas_kernels.wkv6.sequence import wkv6_over_sequence
from pallas_kernels.wkv7 import wkv7
from pallas_kernels.wkv7.sequence import wkv7_over_sequence

B, C, H, K, V = 2, 3, 2, 4, 4
AXIS = "time"


def rows(rng, time):
    return rng.normal(size=(B, time, C))


def linear_scan_inputs(rng, time):
    return dict(a=rng.uniform(-1, 1, (B, time, C)), b=rows(rng, time), h0=rng.normal(size=(B, C)))


def min_gru_inputs(rng, time):
    return dict(hidden=rows(rng, time), gate=rows(rng, time), h0=rng.normal(size=(B, C)))


def min_lstm_inputs(rng, time):
    return dict(hidden=rows(rng, time), forget=rows(rng, time), take=rows(rng, time), h0=rng.normal(size=(B, C)))


def wkv4_inputs(rng, time):
    return dict(w=rng.exponential(size=C), u=rng.normal(size=C), k=20 * rows(rng, time), v=rows(rng, time),
                state=rng.normal(size=(B, 2, C)))


def wkv6_inputs(rng, time):
    key = (B, time, H, K)
    return dict(r=rng.normal(size=key), w=-np.exp(rng.uniform(-5, 3, key)), k=rng.normal(size=key),
                v=rng.normal(size=(B, time, H, V)), u=rng.normal(size=(H, K)), state=rng.normal(size=(B, H, K, V)))


def wkv7_inputs(rng, time):
    x = wkv6_inputs(rng, time)
    del x["u"]
    kappa = rng.normal(size=x["k"].shape)
    kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    return x | dict(a=-kappa, b=kappa * rng.random(kappa.shape))


OPERATIONS = {
    "linear_scan": (linear_scan, linear_scan_over_sequence, linear_scan_inputs),
    "min_gru": (min_gru, min_gru_over_sequence, min_gru_inputs),
    "min_lstm": (min_lstm, min_lstm_over_sequence, min_lstm_inputs),
    "wkv4": (wkv4, wkv4_over_sequence, wkv4_inputs),
    "wkv6": (wkv6, wkv6_over_sequence, wkv6_inputs),
    "wkv7": (wkv7, wkv7_over_sequence, wkv7_inputs),
}


def split_over(devices, name, given):
    """The operation with time over this many devices, as a function of the same whole arrays."""
    over_sequence = OPERATIONS[name][1]
    timed = PartitionSpec(None, AXIS)
    specs = {n: timed if x.ndim >= 2 and n not in ("h0", "state", "u") else PartitionSpec() for n, x in given.items()}
    mesh = Mesh(np.array(jax.devices()[:devices]), (AXIS,))
    return jax.jit(jax.shard_map(lambda given: over_sequence(**given, axis_name=AXIS), mesh=mesh, in_specs=(specs,),
                                 out_specs=(timed, PartitionSpec())))


def inputs_of(name, time, resets, seed=0):
    rng = np.random.default_rng(seed)
    given = OPERATIONS[name][2](rng, time)
    return given if resets is None else given | dict(reset=rng.random((B, time)) < resets)


def assert_equal_to_whole(name, devices, given):
    whole = functools.partial(OPERATIONS[name][0], implementation="reference")
    split = split_over(devices, name, given)
    flags = {n: x for n, x in given.items() if n == "reset"}
    floats = {n: x for n, x in given.items() if n != "reset"}
    rng = np.random.default_rng(1)

    def loss(function, floats):
        y, last = function(floats | flags)
        return jnp.sum(y * weight) + jnp.sum(last * weight_of_last), (y, last)

    shapes = jax.eval_shape(lambda: whole(**given))
    weight, weight_of_last = (rng.normal(size=x.shape) for x in shapes)
    grad = lambda f: jax.jit(jax.grad(functools.partial(loss, f), has_aux=True))(floats)
    got, want = grad(split), grad(lambda given: whole(**given))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-11 * max(1, np.abs(y).max())), got, want)


@pytest.mark.parametrize("name", OPERATIONS)
def test_time_over_five_devices_equals_one(name):
    """Five: not a power of two. Resets: some stretches hold several, some none."""
    with jax.enable_x64(True):
        assert_equal_to_whole(name, 5, inputs_of(name, 15, resets=0.1))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("devices, time, resets", [(1, 3, None), (2, 14, None), (8, 8, 0.3), (8, 40, None),
                                                   (3, 9, 1.0)])
def test_any_number_of_devices_equals_one(name, devices, time, resets):
    with jax.enable_x64(True):
        assert_equal_to_whole(name, devices, inputs_of(name, time, resets))


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_travels_is_states(name):
    """Neighbours exchange states; no device sees another one's stretch of time."""
    given = {n: np.asarray(x, np.float32) for n, x in inputs_of(name, 4096, None).items()}
    program = split_over(8, name, given).lower(given).compile().as_text()
    assert "collective-permute" in program
    assert "all-gather" not in program and "all-to-all" not in program


@pytest.mark.parametrize("log_decay", [-1e4, -1e-3])
def test_strong_and_weak_decays_in_float32(log_decay):
    """A decay that forgets all does not cost the digits of those after it."""
    given = inputs_of("wkv6", 64, None)
    given["w"] = np.where(np.arange(64)[None, :, None, None] % 7 == 3, log_decay, given["w"] * 1e-4)
    with jax.enable_x64(True):
        y, last = wkv6(**given, implementation="reference")
    narrow = {n: np.asarray(x, np.float32) for n, x in given.items()}
    got, got_last = split_over(4, "wkv6", narrow)(narrow)
    np.testing.assert_allclose(got, y, rtol=0, atol=1e-5 * np.abs(y).max())
    np.testing.assert_allclose(got_last, last, rtol=0, atol=1e-5 * np.abs(last).max())


def test_an_empty_past_and_padding_travel_as_nothing():
    """wkv4: a stretch of padding alone (keys of -1e38) hands on the average before it, and no weight of its own."""
    given = {n: np.asarray(x, np.float32) for n, x in inputs_of("wkv4", 16, None).items()}
    given["k"][:, 4:12] = -1e38
    given["state"] = np.stack([np.zeros((B, C)), np.full((B, C), -1e30)], axis=1).astype(np.float32)
    want = wkv4(**given, implementation="reference")
    got = split_over(4, "wkv4", given)(given)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
