"""GPUs as XLA has to know them to compile for one that is not here.

Sources: NVIDIA's white papers of the A100 (GA100), H100 (GH100) and Blackwell architectures and the products' data
sheets for multiprocessors, clock, L2 cache, memory and bandwidth; the CUDA C++ Programming Guide's table "technical
specifications per compute capability" for threads, registers and shared memory. XLA's own choices, of fusions and
tiles, depend on these numbers; what a Pallas kernel is compiled to depends on the compute capability.
"""

from typing import NamedTuple

_THREADS_A_WARP, _THREADS_A_BLOCK, _THREADS_A_MULTIPROCESSOR = 32, 1024, 2048
_REGISTERS, _DEFAULT_SHARED = 64 * 1024, 48 * 1024      # registers a multiprocessor and a block; shared bytes a block
_LARGEST_GRID = (2 ** 31 - 1, 2 ** 16 - 1, 2 ** 16 - 1)


class Gpu(NamedTuple):
    """One product. shared_kib: shared memory of a multiprocessor; a block may ask for 1 KiB less."""
    product: str
    capability: tuple[int, int]
    multiprocessors: int
    lanes: int                      # float32 units of a multiprocessor
    shared_kib: int
    l2_mib: int
    clock_mhz: int                  # boost
    memory_gib: int
    gigabytes_per_second: int

    def description(self) -> str:
        """The message that `target_config` of `get_topology_desc(platform="cuda")` takes, in protobuf's text format."""
        device = dict(
            threads_per_warp=_THREADS_A_WARP, threads_per_block_limit=_THREADS_A_BLOCK,
            threads_per_core_limit=_THREADS_A_MULTIPROCESSOR, core_count=self.multiprocessors, fpus_per_core=self.lanes,
            registers_per_core_limit=_REGISTERS, registers_per_block_limit=_REGISTERS,
            shared_memory_per_block=_DEFAULT_SHARED, shared_memory_per_core=self.shared_kib * 1024,
            shared_memory_per_block_optin=(self.shared_kib - 1) * 1024, l2_cache_size=self.l2_mib * 1024 ** 2,
            clock_rate_ghz=self.clock_mhz / 1000, device_memory_size=self.memory_gib * 1024 ** 3,
            memory_bandwidth=self.gigabytes_per_second * 10 ** 9,
            **{f"block_dim_limit_{axis}": limit for axis, limit in zip("xyz", _LARGEST_GRID, strict=True)})
        major, minor = self.capability
        fields = " ".join(f"{name}: {value}" for name, value in device.items())
        return (f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
                f'platform_name: "CUDA" device_description_str: "{self.product}"')


A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164, 40, 1410, 80, 2039)
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228, 50, 1980, 80, 3350)
B200 = Gpu("NVIDIA B200", (10, 0), 148, 128, 228, 126, 1965, 180, 8000)
