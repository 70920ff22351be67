"""The same losses however the work is divided: over devices, meshes, microbatches, scanned or unrolled layers.

"The same" is ten steps of SGD and of AdamW (eps 1e-6, because Adam turns rounding noise of zero gradients into full
steps), to 1e-5 relative in float32 and 1e-10 in float64.
"""

import functools

import jax
import numpy as np
import pytest
from runs import ADAMW, SGD, losses, packed_batch

MESHES = {
    "data8": dict(data=8),
    "data2_fsdp4": dict(data=2, fsdp=4),
    "data2_fsdp2_tensor2": dict(data=2, fsdp=2, tensor=2),
    "data2_context4": dict(data=2, context=4),
    "fsdp2_context2_tensor2": dict(fsdp=2, context=2, tensor=2),
}
OPTIMIZERS = {"sgd": SGD, "adamw": ADAMW}


@functools.cache
def alone(optimizer: str) -> np.ndarray:
    return losses(optimizer=OPTIMIZERS[optimizer])


# Four meshes with AdamW by default; the rest is slow because each compiles for eight devices.
CASES = [pytest.param(mesh, optimizer, id=f"{mesh}-{optimizer}", marks=() if (mesh, optimizer) in {
    ("data8", "adamw"), ("data2_fsdp4", "adamw"), ("data2_fsdp2_tensor2", "adamw"),
    ("data2_context4", "adamw")} else pytest.mark.slow) for mesh in MESHES for optimizer in OPTIMIZERS]


@pytest.mark.parametrize("mesh, optimizer", CASES)
def test_eight_devices_equal_one(mesh, optimizer):
    np.testing.assert_allclose(losses(optimizer=OPTIMIZERS[optimizer], mesh=MESHES[mesh]), alone(optimizer), rtol=1e-5)


RECURRENT = {"rwkv4": dict(pattern=("rwkv4/channel_mix",)),
             "rwkv7": dict(pattern=("rwkv7/channel_mix",), rwkv7=dict(head_dim=8, value_residual=False),
                           channel_mix=dict(version=7)),
             "min_lstm": dict(pattern=("min_lstm/mlp",), min_lstm=dict(conv_width=3))}


@pytest.mark.parametrize("name, mesh", [
    pytest.param(name, mesh, marks=() if (name, mesh) == ("rwkv4", "fsdp2_context2_tensor2") else pytest.mark.slow)
    for name in RECURRENT for mesh in ("data2_context4", "data2_fsdp2_tensor2", "fsdp2_context2_tensor2")])
def test_recurrent_models_on_eight_devices_equal_one(name, mesh):
    """In float64: what XLA gets wrong in a layout of its own choice is far above rounding."""
    with jax.enable_x64(True):
        model = dict(RECURRENT[name], dtype="float64")
        one, eight = (losses(model=model, mesh=m, steps=4) for m in (None, MESHES[mesh]))
    np.testing.assert_allclose(eight, one, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data2_fsdp2_tensor2",
                                  pytest.param("fsdp2_context2_tensor2", marks=pytest.mark.slow)])
def test_eight_devices_equal_one_in_float64(mesh):
    with jax.enable_x64(True):
        model = dict(dtype="float64")
        one, eight = losses(model=model), losses(model=model, mesh=MESHES[mesh])
    np.testing.assert_allclose(eight, one, rtol=1e-10)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_four_microbatches_equal_one(optimizer):
    np.testing.assert_allclose(losses(optimizer=OPTIMIZERS[optimizer], microbatches=4), alone(optimizer), rtol=1e-5)


def test_microbatches_on_a_mesh_equal_one_device():
    np.testing.assert_allclose(losses(mesh=MESHES["data2_fsdp2_tensor2"], microbatches=2), alone("adamw"), rtol=1e-5)


@pytest.mark.parametrize("optimizer", [
    ADAMW, pytest.param(dict(ADAMW, name="muon", learning_rate=1e-3), marks=pytest.mark.slow),
    pytest.param(SGD, marks=pytest.mark.slow),
    pytest.param(dict(ADAMW, name="lion", learning_rate=1e-4), marks=pytest.mark.slow),
    pytest.param(dict(ADAMW, name="adafactor", learning_rate=1e-3), marks=pytest.mark.slow)], ids=lambda o: o["name"])
def test_scan_equals_unrolled(optimizer):
    scanned = losses(optimizer=optimizer, model=dict(scan=True))
    np.testing.assert_allclose(losses(optimizer=optimizer, model=dict(scan=False)), scanned, rtol=1e-5)


@pytest.mark.slow
def test_remat_changes_nothing():
    np.testing.assert_allclose(losses(model=dict(remat="full")), alone("adamw"), rtol=1e-5)


def test_chunked_loss_equals_whole():
    chunked = losses(loss={"next_token": 1.0, "z_loss": 1e-3, "chunk": 3})
    np.testing.assert_allclose(chunked, alone("adamw"), rtol=1e-5)


def test_fsdp_splits_parameters_and_optimizer_state():
    _, state = losses(mesh=dict(fsdp=8), steps=1, return_state=True)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    # Norm scales and counts stay whole; everything else is an eighth.
    assert held < total / 8 * 1.1


def test_parameters_stay_float32_under_bfloat16():
    _, state = losses(model=dict(dtype="bfloat16"), steps=2, return_state=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}


def test_losses_fall():
    found = losses(batch_of=lambda n: packed_batch(0))
    assert found[-1] < found[0] - 0.1
