"""What a chip can do at most, as published: the one table that `lm plan` reckons with.

TPUs: "Key specifications" of docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x} (November 2026) for memory, bandwidths
and peaks; Jouppi et al., "TPU v4" (ISCA 2023, arXiv:2304.01433), table 4, for v4. Google prints the bandwidth of a
chip's links to its neighbours in both directions together; here is one direction, half of it (v4: six links of
50 GB/s). What a chip has towards other slices is printed for v5p, v6e and 7x; for v5e it is the pod's 6.4 Tb/s over its
256 chips; for v4 it is not published.
GPUs: NVIDIA's data sheets of A100 SXM 80 GB, H100 SXM and HGX B200 (dense peaks, one direction of NVLink), and of DGX
A100, H100 and B200 for the network: one adapter a GPU, of 200, 400 and 400 Gb/s.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """Of one chip: GiB of memory, bytes a second to it, bf16 and tf32-or-float32 matrix FLOP/s, bytes a second that it
    can send within a slice or host (`link`) and beyond (`network`; None where it is not published). cores, and the JAX
    devices that they make up. Float32 matrix products of TPUs run as several of bfloat16, see `passes_float32`."""

    name: str
    gib: float
    bandwidth: float
    peak: float
    link: float
    network: float | None
    cores: int
    devices: int
    link_name: str


GB, TERA = 1e9, 1e12
CHIPS = {chip.name: chip for chip in (
    Chip("v4", 32, 1228 * GB, 275 * TERA, 300 * GB, None, 2, 1, "ICI"),
    Chip("v5e", 16, 819 * GB, 197 * TERA, 200 * GB, 3.125 * GB, 1, 1, "ICI"),
    Chip("v5p", 95, 2765 * GB, 459 * TERA, 600 * GB, 6.25 * GB, 2, 1, "ICI"),
    Chip("v6e", 32, 1638 * GB, 918 * TERA, 400 * GB, 12.5 * GB, 1, 1, "ICI"),
    Chip("7x", 192, 7380 * GB, 2307 * TERA, 600 * GB, 12.5 * GB, 2, 2, "ICI"),
    Chip("a100", 80, 2039 * GB, 312 * TERA, 300 * GB, 25 * GB, 1, 1, "NVLink"),
    Chip("h100", 80, 3350 * GB, 989 * TERA, 450 * GB, 50 * GB, 1, 1, "NVLink"),
    Chip("b200", 180, 8000 * GB, 2250 * TERA, 900 * GB, 50 * GB, 1, 1, "NVLink"),
)}
# Products of float32 at jax's default precision run as one of bfloat16 on TPUs, and as TF32, half as fast, on GPUs.
FLOAT32_PASSES = {"ICI": 1.0, "NVLink": 2.0}
