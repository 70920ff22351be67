"""What ptxas said is read from the files that the compilers leave, and GPUs are described in full. Nothing compiles."""

import pytest

from pallas_kernels.aot import gpu_compilation
from pallas_kernels.aot.targets import TARGETS

SAID = """ptxas info    : Compiling entry function '{name}' for 'sm_90a'
ptxas info    : Function properties for {name}
    40 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 2 barriers, 1 bytes smem
"""


def said(name, registers=40, stores=0, loads=0):
    return SAID.format(name=name, registers=registers, stores=stores, loads=loads)


def test_registers_and_spills_are_those_of_the_kernels_asked_for(tmp_path, monkeypatch):
    (tmp_path / "wkv4_forward_0.ptxas").write_text(said("wkv4_forward_mosaic_gpu_kernel", 55))
    (tmp_path / "wkv4_forward_0.ptx").write_text(".entry")
    (tmp_path / "module_0001.jit_f.1.ptx").write_text(".entry")
    (tmp_path / "module_0001.jit_f.2.ptx").write_text("")
    asked = []

    def ptxas(path):
        asked.append(path.name)
        return said("input_fusion", 9) + said("wkv4_backward", 255, 36, 40) + said("wkv4_backward_1", 90, 0, 4)

    monkeypatch.setattr(gpu_compilation, "_ptxas", ptxas)
    found = gpu_compilation.resources(tmp_path, ["wkv4_forward", "wkv4_backward"])
    assert found == {"wkv4_forward": dict(registers=55, spills=0), "wkv4_backward": dict(registers=255, spills=80)}
    assert asked == ["module_0001.jit_f.1.ptx"]
    assert gpu_compilation.resources(tmp_path, ["other"]) == {}


def test_calls_are_named_after_the_kernel():
    class Compiled:
        def as_text(self):
            return "\n".join([
                '%a = custom-call(%x), custom_call_target="mosaic_gpu_v2", '
                'metadata={op_name="jit(f)/jvp()/wkv4_forward/mpmd_map" scheduling_name="mpmd_map.3"}',
                '%b = custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", '
                'metadata={op_name="jit(f)/transpose(jvp())/wkv4_backward/pallas_call" stack_frame_id=3}',
                '%c = custom-call(%x), custom_call_target="__cublas$gemm", metadata={op_name="jit(f)/dot"}'])

    assert gpu_compilation.kernels_in(Compiled()) == ["wkv4_forward", "wkv4_backward"]


@pytest.mark.parametrize("name", ["a100", "h100", "b200"])
def test_a_description_balances_and_names_the_capability(name):
    gpu = TARGETS[name].gpu
    text = gpu.description()
    assert text.count("{") == text.count("}") == 2 and gpu.product in text
    major, minor = gpu.capability
    assert f"cuda_compute_capability {{ major: {major} minor: {minor} }}" in text
    assert f"shared_memory_per_block_optin: {gpu.shared_kib * 1024 - 1024}" in text
