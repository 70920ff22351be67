"""TPU slices by name: chips, cores and machines as Google counts them."""

import math

import pytest

from launch.tpu_slices import GENERATIONS, find_slice, topologies


@pytest.mark.parametrize(("name", "shape", "chips", "hosts", "cloud"), [
    ("v5e-1", "1x1", 1, 1, "v5litepod-1"), ("v5e-8", "2x4", 8, 1, "v5litepod-8"),
    ("v5litepod-16", "4x4", 16, 4, "v5litepod-16"), ("v5e-256", "16x16", 256, 64, "v5litepod-256"),
    ("v4-8", "2x2x1", 4, 1, "v4-8"), ("v4-32", "2x2x4", 16, 4, "v4-32"), ("v4-4096", "8x16x16", 2048, 512, "v4-4096"),
    ("v5p-512", "4x8x8", 256, 64, "v5p-512"), ("v5p:4x4x8", "4x4x8", 128, 32, "v5p-256"),
    ("V6E-256", "16x16", 256, 64, "v6e-256"), ("v5e:4x4", "4x4", 16, 4, "v5litepod-16")])
def test_names_mean_what_google_means_by_them(name, shape, chips, hosts, cloud):
    found = find_slice(name)
    assert (found.shape, found.chips, found.hosts, found.accelerator_type) == (shape, chips, hosts, cloud)
    assert found.hosts * found.chips_per_host == chips


def test_names_of_7x_count_chips_and_are_no_tpu_vms():
    assert find_slice("7x-64") == find_slice("ironwood:4x4x4")
    with pytest.raises(ValueError, match="through GKE only"):
        find_slice("7x-64").accelerator_type  # noqa: B018


@pytest.mark.parametrize("generation", GENERATIONS.values(), ids=lambda g: g.name)
def test_usual_topologies_fill_whole_machines_up_to_the_pod(generation):
    sizes = [math.prod(shape) for shape in topologies(generation)]
    assert sizes == sorted(set(sizes)) and sizes[-1] == math.prod(generation.largest)
    assert all(find_slice(f"{generation.name}-{n * generation.cores_named}").chips == n for n in sizes)


@pytest.mark.parametrize(("name", "says"), [
    ("v5e-3", "counts chips.*v5e-1, v5e-4"), ("v4-12", "counts cores.*v4-8, v4-16"), ("v5x-8", "did you mean 'v5"),
    ("h100", "no TPU slice"), ("v5p:4x4", "3 sides"), ("v5e:32x16", "up to 16x16"), ("v4:3x1x1", "multiple of 4")])
def test_what_does_not_exist_is_refused_with_what_does(name, says):
    with pytest.raises(ValueError, match=says):
        find_slice(name)
