"""jax is told to use the CPU only where no other device can be there and the user did not choose."""

import pytest

from launch import accelerators
from launch.accelerators import choose_platform, present_devices


@pytest.fixture
def device_files(monkeypatch, tmp_path):
    """Lets the device files of the machine be those made under a folder."""
    patterns = {kind: tuple(f"{tmp_path}{pattern}" for pattern in found)
                for kind, found in accelerators.DEVICE_FILES.items()}
    monkeypatch.setattr(accelerators, "DEVICE_FILES", patterns)
    monkeypatch.setattr(accelerators.sys, "platform", "linux")

    def make(*names):
        for name in names:
            path = tmp_path / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return make


def test_without_a_device_jax_is_told_to_use_the_cpu(device_files):
    environ = {}
    assert "no TPU or GPU" in choose_platform(environ)
    assert environ == {"JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(("files", "environ", "expected"), [
    (["/dev/accel0"], {}, ["tpu"]), (["/dev/vfio/3"], {}, ["tpu"]), (["/dev/nvidia0"], {}, ["gpu"]),
    (["/dev/dxg"], {}, ["gpu"]), (["/dev/kfd"], {}, ["gpu"]), (["/dev/nvidiactl", "/dev/accel1"], {}, ["tpu", "gpu"]),
    ([], {"TPU_NAME": "pod"}, ["tpu"]), (["/dev/vfio/vfio"], {}, []), (["/dev/accel"], {}, []),
    ([], {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1"}, []),  # ahead-of-time compilation
])
def test_devices_are_found_by_their_files_or_the_variables_of_a_tpu_machine(device_files, files, environ, expected):
    device_files(*files)
    assert present_devices(environ) == expected
    before = dict(environ)
    assert (choose_platform(environ) is None) == bool(expected)
    assert (environ == before) == bool(expected)


@pytest.mark.parametrize("environ", [{"JAX_PLATFORMS": "tpu"}, {"JAX_PLATFORM_NAME": "gpu"}])
def test_the_users_choice_stands(device_files, environ):
    before = dict(environ)
    assert choose_platform(environ) is None
    assert environ == before


def test_other_systems_are_left_alone(device_files, monkeypatch):
    monkeypatch.setattr(accelerators.sys, "platform", "darwin")
    environ = {}
    assert choose_platform(environ) is None
    assert environ == {}
