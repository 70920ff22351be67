"""Peak bf16 matrix FLOP/s of the devices that JAX may report: the denominator of MFU.

A device that is not in the tables is unknown, and MFU is then not printed: no number is better than a wrong one. Names
are compared whole, so that a MIG slice ("NVIDIA H100 80GB HBM3 MIG 1g.10gb") does not pass for the card.
"""

from typing import Any, NamedTuple


class TPUChip(NamedTuple):
    """peak: dense bf16 FLOP/s of a chip. cores: its TensorCores. cores_per_device: how many of them one JAX device
    has at run time, used where a device does not tell."""

    peak: float
    cores: int
    cores_per_device: int


_V5E, _V5P, _V6E = TPUChip(197e12, 1, 1), TPUChip(459e12, 2, 2), TPUChip(918e12, 1, 1)

# Peaks: "Peak compute per chip (BF16)" of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. (jax/_src/tpu_info.py
# rounds three of them: v6e 920, 7x 2310.) Names: chip_version_from_device_kind in that file; libtpu 0.0.42 reports
# "TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite" and "TPU7x" for compile-only topologies. The two cores of v4 and
# v5p run as one device ("megacore"), those of 7x as two devices.
TPU_CHIPS: dict[str, TPUChip] = {
    "TPU v4": TPUChip(275e12, 2, 2),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": TPUChip(2307e12, 2, 1),
}

# Dense (without the factor 2 of structured sparsity) bf16 with float32 accumulation, from NVIDIA's data sheets, which
# for Hopper and later print the sparse number: 1,979 / 1,513 / 1,671 TFLOP/s for SXM / PCIe / NVL. Names are what the
# driver reports, as `nvidia-smi -L` prints them.
GPUS: dict[str, float] = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM5
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H200": 989e12,  # SXM5
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2.25e15,  # HGX B200: 36 PFLOP/s sparse for eight
    "NVIDIA GB200": 2.5e15,  # GB200 NVL72: 360 PFLOP/s sparse for 72
    "NVIDIA L4": 121e12,
    # Ada white paper, appendix A: 165.2 with float32 accumulation, which bf16 always has on GeForce.
    "NVIDIA GeForce RTX 4090": 165.2e12,
}


def peak_flops(device_kind: str, num_cores: int | None = None) -> float | None:
    """Dense bf16 FLOP/s of one JAX device, or None where the device is not known.

    device_kind: as `jax.Device.device_kind` gives it. num_cores: TensorCores of that JAX device where it tells
    (`jax.Device.num_cores` on TPU): a compile-only topology of v4 lists each core as a device, with half the peak.
    """
    if device_kind in TPU_CHIPS:
        chip = TPU_CHIPS[device_kind]
        cores = chip.cores_per_device if num_cores is None else num_cores
        return chip.peak * cores / chip.cores
    return GPUS.get(device_kind)


def device_peak_flops(device: Any) -> float | None:
    """`peak_flops` of a `jax.Device`; None for CPUs and other devices that are not in the tables."""
    return peak_flops(device.device_kind, getattr(device, "num_cores", None))
