"""What the TensorRT plugins launch, seen by a stand-in for libcuda, is what the kernels' own launchers pass to Triton."""

import importlib
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from latentrt.plugins import cache_formats, ops, trt_base
from latentrt.plugins.architecture import Gpu
from latentrt.plugins.mla_attention import plan as attention
from latentrt.plugins.mla_prefill import plan as prefill
from latentrt.plugins.moe_experts import plan as experts
from latentrt.plugins.moe_route import plan as route

pytestmark = pytest.mark.slow

pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13: the plugins are its classes")
pytest.importorskip("cuda.bindings", reason="pip install cuda-bindings")
if shutil.which("gcc") is None:
    pytest.skip("needs gcc to compile the stand-in for libcuda", allow_module_level=True)

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
WORKSPACE, STREAM = 1 << 40, 0x5EED
BF16, FP8, I8, I32 = torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int32


def ints(*shape):
    return torch.zeros(shape, dtype=I32)


def attend(tokens, sequences, max_pages, heads=16, cache_format="bfloat16"):
    layout = cache_formats.get(cache_format)
    inputs = dict(
        q_latent=torch.zeros(tokens, heads, 512, dtype=BF16), q_pe=torch.zeros(tokens, heads, 64, dtype=BF16),
        latent=torch.zeros(tokens, 512, dtype=BF16), k_pe=torch.zeros(tokens, 64, dtype=BF16),
        cache=torch.zeros(4, 64, layout.width(512, 64), dtype=layout.dtype),
        block_table=ints(sequences, max_pages), cached_lengths=ints(sequences),
        query_starts=ints(sequences + 1), num_tokens=ints(1),
    )  # fmt: skip
    attributes = dict(softmax_scale=0.1147, cache_format=cache_format)
    config = attention.Attention(heads, 512, 64, 64, "bfloat16", cache_format, struct.unpack("f", struct.pack("f", 0.1147))[0])
    return "mla_attention", inputs, attributes, attention.kernels, config


def expand(tokens, sequences, max_pages, heads=16, cache_format="bfloat16"):
    _, inputs, attributes, _, config = attend(tokens, sequences, max_pages, heads, cache_format)
    queries = dict(q_nope=torch.zeros(tokens, heads, 128, dtype=BF16))
    rows = {k: inputs[k] for k in ("q_pe", "latent", "k_pe")}
    weights = dict(w_uk=torch.zeros(heads, 128, 512, dtype=BF16), w_uv=torch.zeros(heads, 512, 128, dtype=BF16))
    batch = {k: v for k, v in inputs.items() if k not in ("q_latent", *rows)}
    config = prefill.Prefill(heads, 512, 128, 64, 128, 64, "bfloat16", cache_format, config.softmax_scale)
    return "mla_prefill", queries | rows | weights | batch, attributes, prefill.kernels, config


def choose(tokens, **overrides):
    attributes = dict(scoring_func="softmax", topk_method="group_limited_greedy", group_score="max", n_group=8, topk_group=3,
                      top_k=6, norm_topk_prob=0, routed_scaling_factor=16.0) | overrides  # fmt: skip
    inputs = dict(router_logits=torch.zeros(tokens, 160), num_tokens=ints(1))
    return "moe_route", inputs, attributes, route.kernels, route.Routing(160, has_bias=False, **attributes)


def share(tokens, weights=BF16):
    """The experts of one of 8 ranks: ids are less than 0, or beyond."""
    op, inputs, attributes, kernels, config = compute(tokens, weights)
    return op, inputs, attributes | {"total_experts": 64}, kernels, replace(config, total_experts=64)


def compute(tokens, weights=BF16):
    blocks = {BF16: None, FP8: ((), ()), I8: ((3,), (1,))}[weights]
    packed = 2 if weights == I8 else 1
    scales = dict(gate_up_scale=torch.zeros(8, 128, *blocks[0]), down_scale=torch.zeros(8, 192, *blocks[1])) if blocks else {}
    inputs = dict(
        x=torch.zeros(tokens, 192, dtype=BF16), topk_ids=ints(tokens, 4), topk_weights=torch.zeros(tokens, 4),
        gate_up_proj=torch.zeros(8, 128, 192 // packed).to(weights), down_proj=torch.zeros(8, 192, 64 // packed).to(weights),
        **scales,
    )  # fmt: skip
    attributes = dict(first_expert=0, gate_up_layout="concatenated", packed=packed)
    word, numbers = str(weights).removeprefix("torch."), (3, 1) if weights == I8 else (1, 1)
    config = experts.Experts(8, 192, 64, 4, "bfloat16", word, 0, "concatenated", *numbers, packed=packed)
    return "moe_experts", inputs, attributes, experts.kernels, config


CASES = {
    "one token, split over the cache": attend(1, 1, 64),
    "a decode batch": attend(16, 16, 8),
    "a prompt": attend(300, 2, 8),
    "128 heads": attend(5, 5, 32, heads=128),
    "an expanded prompt": expand(300, 2, 8),
    "an expanded prompt in segments": expand(40, 2, 100, heads=128),
    "a decode batch over a cache of 6 bits": attend(16, 16, 8, cache_format="int6"),
    "an expanded prompt into an fp8 cache": expand(300, 2, 8, cache_format="fp8"),
    "group-limited routing": choose(37),
    "greedy sigmoid routing": choose(3, scoring_func="sigmoid", topk_method="greedy", n_group=1, topk_group=1),
    "one token's experts": compute(1),
    "experts of a prompt": compute(400),
    "FP8 experts of one token": compute(1, FP8),
    "FP8 experts of some tokens": compute(90, FP8),
    "FP8 experts of a prompt": compute(400, FP8),
    "a rank's experts in a decode step of all ranks": share(64),
    "a rank's FP8 experts in a prompt of all ranks": share(2048, FP8),
    "int4 experts of one token": compute(1, I8),
    "int4 experts of a prompt": compute(400, I8),
}


class Recorder:
    """Stands for a Triton function: notes grid and arguments."""

    def __init__(self, name: str, calls: list):
        self.name, self.calls = name, calls

    def __getitem__(self, grid):
        return lambda **values: self.calls.append((self.name, grid, values))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> dict[str, dict]:
    """Every case run by its plugin in one child process on the stand-in."""
    folder = tmp_path_factory.mktemp("standin")
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", folder / "libcuda.so.1", HERE / "libcuda_standin.c"], check=True)
    (folder / "cases.json").write_text(json.dumps([described(*case) for case in CASES.values()]))
    paths = {"LD_LIBRARY_PATH": str(folder), "CUDA_STANDIN_LOG": str(folder / "log")}
    child = subprocess.run(
        [sys.executable, "-m", "tests.plugins.recorded_launches", str(folder / "cases.json")],
        env=os.environ | paths | {"TRITON_INTERPRET": "0"}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]
    return dict(zip(CASES, json.loads(child.stdout.splitlines()[-1]), strict=True))


def described(op, inputs, attributes, kernels, config) -> dict:
    """A case as JSON. Output tensors lie where `outputs_of` says."""
    target = Gpu.of(89)

    def tensor(value, address):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch."), "address": address}

    specs = kernels(config, target)
    return {
        "op": op, "attributes": attributes, "capability": 89, "num_sms": target.num_sms, "workspace": WORKSPACE,
        "stream": STREAM, "kernels": [manifest(s, number) for number, s in enumerate(specs)],
        "inputs": [tensor(v, v.data_ptr()) for v in inputs.values()],
        "outputs": [{"shape": [1], "dtype": "float32", "address": a} for a in outputs_of(op, inputs)],
    }  # fmt: skip


def manifest(spec, number: int) -> dict:
    """As plugins/launch/compile.py writes it; shared memory, which only a compiler knows, is made up: below and over 48 KiB."""
    name = f"{spec.op}_{spec.function}_{zlib.crc32(repr(spec).encode())}"  # the stand-in tells kernels of all cases by it
    return {"spec": asdict(spec), "name": name, "architecture": 89,
            "num_warps": spec.num_warps, "num_ctas": 1, "shared_bytes": 40_000 + 10_000 * (number % 3),
            "global_scratch_bytes": 0, "profile_scratch_bytes": 0, "parameters": [list(a) for a in spec.arguments]}  # fmt: skip


def outputs_of(op, inputs) -> list[int]:
    """Addresses of the outputs in the contract's order; the cache's output is the cache."""
    if op.startswith("mla_"):
        return [0xA0000, inputs["cache"].data_ptr()]
    return {"moe_route": [0xB0000, 0xC0000], "moe_experts": [0xD0000]}[op]  # fmt: skip


def passed_to_triton(monkeypatch, op, inputs, attributes) -> list[tuple]:
    """(function, grid, arguments by name) of every launch that the op's own launcher makes."""
    calls, module = [], ops.part(op, "kernel")
    _, _, _, kernels, config = next(c for c in CASES.values() if c[1] is inputs)
    for spec in kernels(config, Gpu.of(89)):
        owner = ops.part(spec.op, "kernel")
        monkeypatch.setattr(owner, spec.function, Recorder(spec.function, calls))
    optional = {"moe_route": {"correction_bias": None}, "moe_experts": {"gate_up_scale": None, "down_scale": None}}.get(op, {})
    launch = getattr(module, f"{op}_" if op.startswith("mla_") else op)
    # TensorRT hands float attributes over as float32
    narrow = {k: struct.unpack("f", struct.pack("f", v))[0] if isinstance(v, float) else v for k, v in attributes.items()}
    launch(**(optional | inputs | narrow), target=Gpu.of(89))
    return calls


@pytest.mark.parametrize("name", CASES)
def test_launches_are_those_of_the_kernels_own_launcher(recorded, monkeypatch, name):
    op, inputs, attributes, kernels, config = CASES[name]
    manifests = {spec: manifest(spec, i) for i, spec in enumerate(kernels(config, Gpu.of(89)))}
    seen = [c for c in recorded[name]["calls"] if c["call"] == "cuLaunchKernel"]
    expected = passed_to_triton(monkeypatch, op, inputs, attributes)
    assert len(seen) == len(expected) > 0
    labels, ranges = {v.data_ptr(): k for k, v in inputs.items()}, {}
    for launch, (function, grid, values) in zip(seen, expected, strict=True):
        kernel = next(m for m in manifests.values() if m["name"] == launch["kernel"])
        spec = kernel["spec"]
        assert spec["function"] == function and dict(spec["constexprs"]).items() <= values.items()
        assert launch["grid"] == list(grid)
        assert launch["block"] == [32 * values["num_warps"], 1, 1]
        assert launch["shared"] == kernel["shared_bytes"] and launch["stream"] == STREAM
        *arguments, global_scratch, profile_scratch = launch["arguments"]
        assert (global_scratch, profile_scratch) == (0, 0)
        for (argument, kind), bits in zip(spec["arguments"], arguments, strict=True):
            check_value(values[argument], kind, bits, labels, ranges)
    check_memory(op, inputs, ranges, recorded[name]["workspace"])


def check_value(value, kind: str, bits: int, labels: dict, ranges: dict) -> None:
    """Numbers are equal bit by bit; an address stands for one tensor of the launcher, always the same."""
    if not isinstance(value, torch.Tensor):
        assert bits == struct.unpack("I", struct.pack("f" if kind == "fp32" else "i", value))[0]
    elif value.data_ptr() in labels:
        assert bits == value.data_ptr(), labels[value.data_ptr()]
    else:
        size = prod(value.shape) * value.element_size()
        assert ranges.setdefault(value.data_ptr(), (bits, size)) == (bits, size)


def check_memory(op, inputs, ranges: dict, workspace: int) -> None:
    """What is not an input is an output, or lies in the workspace without overlap, 256-byte aligned."""
    inside = sorted(r for r in ranges.values() if r[0] not in outputs_of(op, inputs))
    assert {r[0] for r in ranges.values()} - {r[0] for r in inside} <= set(outputs_of(op, inputs))
    assert len(ranges) - len(inside) == len(outputs_of(op, inputs)) - op.startswith("mla_")
    assert all(address % 256 == 0 for address, _ in inside)
    ends = [WORKSPACE, *[address + size for address, size in inside]]
    assert all(end <= address for end, (address, _) in zip(ends, inside, strict=False))
    assert ends[-1] <= WORKSPACE + workspace


def test_kernels_are_loaded_before_the_first_launch_and_nothing_else_is_called(recorded):
    for case in recorded.values():
        assert {c["call"] for c in case["loading"]} <= {"cuModuleLoadData", "cuFuncSetAttribute"}
        assert case["again"] == case["calls"], "a step of another shape leaves nothing behind"
        assert {c["call"] for c in case["calls"]} == {"cuLaunchKernel"}  # any other driver call fails on the stand-in


def test_shared_memory_over_48_kib_is_asked_for(recorded):
    for case, (_, _, _, kernels, config) in zip(recorded.values(), CASES.values(), strict=True):
        asked = {c["kernel"]: c["value"] for c in case["loading"] if c["call"] == "cuFuncSetAttribute"}
        manifests = [manifest(s, i) for i, s in enumerate(kernels(config, Gpu.of(89)))]
        assert asked == {m["name"]: m["shared_bytes"] for m in manifests if m["shared_bytes"] > 48 * 1024}


@pytest.mark.parametrize("op", ops.plugins().values(), ids=ops.plugins())
def test_without_a_launcher_a_step_does_nothing(op):
    """As while an engine is built: full TensorRT prepares and times plugins, with nothing sensible in their inputs."""
    package = importlib.import_module("tensorrt_rtx")
    plugin = trt_base._plugin_class(package, op, None)({}, 89).clone()
    inputs = [SimpleNamespace(dims=[1] * len(i.dims), type=package.int32) for i in op.contract.inputs]
    wild = [0xDEAD] * len(inputs)
    assert plugin.on_shape_change(inputs, []) is None
    assert plugin.enqueue(inputs, [], wild, [0xDEAD] * len(op.contract.outputs), 0xDEAD, 0) is None
