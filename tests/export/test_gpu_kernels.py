"""Compiled kernels on their way into a bundle: what the gates find stops the build, unless its reason is noted."""

from dataclasses import asdict

import pytest

from export.errors import BuildError
from export.lowering import gpu_kernels
from plugins import compile as compiler
from plugins.compile import CompiledKernel
from plugins.launch import KernelSpec

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
    ({"instructions": {"FFMA": 9}}, "tensor cores: no "), ({"stack_bytes": 8}, "spills: 8 bytes of stack a thread"),
    ({"instructions": WHOLE["instructions"] | {"LDL": 2}}, "spills: 0 bytes of stack a thread, {'LDL': 2}"),
])  # fmt: skip
def test_findings_stop_the_build(changes, words, monkeypatch, tmp_path):
    kernel = spec(tensor_cores="fp8")
    compiled(monkeypatch, tmp_path, kernel, **changes)
    with pytest.raises(BuildError) as error:
        gpu_kernels.compile_all([kernel], 89)
    assert words in str(error.value)
    assert "kernel moe_experts.gate_up for sm89" in str(error.value) and "plugins/moe_experts/tiles.py" in str(error.value)


def test_noted_reasons_do_not(monkeypatch, tmp_path):
    for kernel, changes in ((spec(spills_because="outside the loop"), {"stack_bytes": 8}), (spec(tensor_cores="fp8"), {})):
        compiled(monkeypatch, tmp_path, kernel, **changes)
        assert [k.function for k in gpu_kernels.compile_all([kernel], 89)] == ["gate_up"]
