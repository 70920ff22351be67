"""Peaks of devices: whole chips, halves of chips, and refusing to guess."""

import pathlib
import re
import types

import jax
import pytest

from lm.train.devices import GPUS, TPU_CHIPS, device_peak_flops, peak_flops


@pytest.mark.parametrize(("kind", "expected"), [
    ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H200", 989e12), ("NVIDIA B200", 2.25e15), ("NVIDIA L4", 121e12), ("NVIDIA GeForce RTX 4090", 165.2e12)])
def test_known_devices_have_their_dense_bf16_peak(kind, expected):
    assert peak_flops(kind) == expected


def test_a_device_that_is_half_a_chip_has_half_the_peak():
    assert peak_flops("TPU7x") == 2307e12 / 2  # two JAX devices a chip at run time
    assert peak_flops("TPU v4", num_cores=1) == 275e12 / 2  # as a compile-only topology lists it
    assert peak_flops("TPU v4", num_cores=2) == 275e12
    assert device_peak_flops(types.SimpleNamespace(device_kind="TPU v5", num_cores=2)) == 459e12
    assert device_peak_flops(types.SimpleNamespace(device_kind="NVIDIA H200")) == 989e12


@pytest.mark.parametrize("kind", ["cpu", "", "TPU v9", "TPU v4 lite", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
                                  "NVIDIA GeForce RTX 4090 Laptop GPU", "nvidia h200"])
def test_unknown_devices_are_unknown(kind):
    assert peak_flops(kind) is None


def test_this_cpu_is_unknown():
    assert device_peak_flops(jax.devices()[0]) is None


def test_tpu_peaks_agree_with_the_table_inside_jax_within_one_percent():
    """Independent of our table; that one rounds."""
    tpu_info = pytest.importorskip("jax._src.pallas.mosaic.tpu_info")
    for kind, chip in TPU_CHIPS.items():
        version = tpu_info.chip_version_from_device_kind(kind)
        assert version is not None, kind
        assert version.num_physical_tensor_cores_per_chip == chip.cores
        assert (chip.cores_per_device == 2) == version.supports_megacore
        info = tpu_info.get_tpu_info_for_chip(version, chip.cores_per_device)
        # That table is per core, but for v5p, which it gives per chip: hence the choice of two.
        theirs = (info.bf16_ops_per_second, info.bf16_ops_per_second * chip.cores_per_device)
        assert min(abs(peak_flops(kind) / t - 1) for t in theirs) < 0.01, (kind, theirs)


def test_no_gpu_peak_is_the_sparse_number():
    assert max(GPUS.values()) <= 2.5e15


def test_the_documented_table_is_the_one_that_is_used():
    page = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "flops.md").read_text()
    documented = {}
    for kinds, tera in re.findall(r"^\| (`.+?`) \| ([\d.]+) \|", page, re.MULTILINE):
        documented |= {kind: float(tera) * 1e12 for kind in re.findall(r"`(.+?)`", kinds)}
    assert documented == {kind: pytest.approx(peak_flops(kind)) for kind in (*TPU_CHIPS, *GPUS)}
