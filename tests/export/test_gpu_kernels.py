"""Compiled kernels on their way into a bundle: what cannot work stops the build, what is only slow does not."""

from dataclasses import asdict

import pytest

from latentrt.export.errors import BuildError
from latentrt.export.lowering.tensorrt import gpu_kernels
from latentrt.plugins.launch import compile as compiler
from latentrt.plugins.launch.compile import CompiledKernel
from latentrt.plugins.launch.plan import KernelSpec

WHOLE = {"architecture": 89, "shared_bytes": 1024, "stack_bytes": 0, "instructions": {"QMMA": 4, "HMMA": 4}}


def compiled(monkeypatch, tmp_path, spec: KernelSpec, **changes) -> None:
    """The cache holds a kernel whose manifest says WHOLE with `changes`; nothing may be disassembled."""
    kernel = CompiledKernel(tmp_path / "k.cubin", WHOLE | {"spec": asdict(spec)} | changes)
    monkeypatch.setattr(compiler, "load", lambda spec, capability, cache=None: kernel)
    monkeypatch.setattr(compiler, "_cuobjdump", None)


def spec(**fields) -> KernelSpec:
    return KernelSpec("moe_experts", "gate_up", arguments=(), constexprs=(), num_warps=4, num_stages=2, grid="", **fields)


@pytest.mark.parametrize(("changes", "words"), [
    ({"shared_bytes": 1 << 20}, "shared memory: 1048576 bytes, sm_89 has"),
    ({"instructions": {"FFMA": 9}}, "tensor cores: no "),
])  # fmt: skip
def test_faults_stop_the_build(changes, words, monkeypatch, tmp_path):
    kernel = spec(tensor_cores="fp8")
    compiled(monkeypatch, tmp_path, kernel, **changes)
    with pytest.raises(BuildError) as error:
        gpu_kernels.compile_all([kernel], 89)
    assert words in str(error.value)
    assert "kernel moe_experts.gate_up for sm89" in str(error.value) and "plugins/moe_experts/tiles.py" in str(error.value)


@pytest.mark.parametrize("slow", [{"stack_bytes": 8}, {"instructions": WHOLE["instructions"] | {"LDL": 2}}])
def test_spills_do_not(slow, monkeypatch, tmp_path):
    kernel = spec(tensor_cores="fp8")
    compiled(monkeypatch, tmp_path, kernel, **slow)
    assert [k.spec.function for k in gpu_kernels.compile_all([kernel], 89)] == ["gate_up"]
    assert "spills" in compiler.findings(compiler.load(kernel, 89))[0]


def test_noted_reasons_excuse_spills(monkeypatch, tmp_path):
    kernel = spec(tensor_cores="fp8", spills_because="outside the loop")
    compiled(monkeypatch, tmp_path, kernel, stack_bytes=8)
    assert compiler.findings(compiler.load(kernel, 89)) == []
