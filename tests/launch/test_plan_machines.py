"""`lm plan --target`: which machines there are, what they are made of, and what is refused."""

import pytest

from launch.planning.chips import CHIPS
from launch.planning.machines import find_machine
from lm.train.devices import GPUS, TPU_CHIPS
from pallas_kernels.aot.targets import TARGETS


@pytest.mark.parametrize(("name", "chips", "cores", "devices", "gib", "topology"), [
    ("v5e-256", 256, 256, 256, 16, "v5e:16x16"), ("v5litepod-16", 16, 16, 16, 16, "v5e:4x4"),
    ("v5p-512", 256, 512, 256, 95, "v5p:4x8x8"), ("v4-32", 16, 32, 16, 32, "v4:2x2x4"),
    ("v5p:4x4x8", 128, 256, 128, 95, "v5p:4x4x8"), ("7x-8", 8, 16, 16, 96, "tpu7x:2x2x2"),
    ("tpu7x:2x2x1", 4, 8, 8, 96, "tpu7x:2x2x1"), ("v6e-1", 1, 1, 1, 32, "v6e:1x1"),
    ("2xv5e-256", 512, 512, 512, 16, "v5e:16x16"), ("2x7x-8", 16, 32, 32, 96, "tpu7x:2x2x2"),
    ("8xH100", 8, 8, 8, 80, "1x1x8"), ("h100-8", 8, 8, 8, 80, "1x1x8"), ("16xB200", 16, 16, 16, 180, "1x2x8"),
    ("A100", 1, 1, 1, 80, "1x1x1")])
def test_machines_are_found_by_name(name, chips, cores, devices, gib, topology):
    machine = find_machine(name)
    assert (machine.chips, machine.cores, machine.devices, machine.gib, machine.topology) == (chips, cores, devices,
                                                                                             gib, topology)
    assert f"{chips} x" in machine.describe() and f"{cores} cores, {devices} devices" in machine.describe()
    assert find_machine(machine.name) == machine


@pytest.mark.parametrize(("name", "message"), [
    ("v5e", "does not say how many"), ("v5f-8", "did you mean 'v5"), ("v5e-200", "nearest: .*v5e-256"),
    ("h100-12", "nearest: 16xH100"), ("v4-x", "write v5e-256, or a topology"),
    ("v5p-3", "counts cores.*nearest: v5p-8"),
    ("3xh100-2", "says twice"), ("0xv5e-4", "no slices"), ("v5e:3x3x3", "has 2 sides"), ("l4", "kinds: v4, v5e")])
def test_other_names_are_refused_with_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        find_machine(name)


def test_compilers_are_told_what_a_name_does_not_say():
    """Slices, that a v4 chip runs as one device, and that a single chip is a host."""
    assert find_machine("2xv5e-256").topology_options() == {"num_slices": 2}
    assert find_machine("v4-8").topology_options() == {"chip_config_name": "megacore"}
    assert find_machine("v5e-1").topology_options() == {"chips_per_host_bounds": (1, 1, 1)}
    assert find_machine("v5e-8").topology_options() == {}


def test_chips_agree_with_the_other_tables():
    """Peaks with those that MFU is measured by, bandwidths with those that kernels are bound by, a device's share."""
    kinds = {"v4": "TPU v4", "v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e", "7x": "TPU7x"}
    for name, chip in CHIPS.items():
        target = TARGETS[name]
        if target.gpu is None:
            assert chip.peak == TPU_CHIPS[kinds[name]].peak
            parts = chip.peak / target.peak_flops   # v4 and 7x: a kernel's device is half a chip
            assert chip.bandwidth == parts * target.bytes_per_second
        else:
            assert chip.bandwidth == 1e9 * target.gpu.gigabytes_per_second
            assert chip.gib == target.gpu.memory_gib
    assert (CHIPS["h100"].peak, CHIPS["b200"].peak) == (GPUS["NVIDIA H100 80GB HBM3"], GPUS["NVIDIA B200"])
