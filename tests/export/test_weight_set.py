"""Weight sets: read back by the safetensors package and compared with quantization written out here; bounded memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentrt.export import weight_set
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.checkpoint.finite import finite_or_refuse
from latentrt.export.errors import CheckpointError
from latentrt.export.lowering.onnxruntime.lowering import stored_weights
from latentrt.export.models import registry
from latentrt.export.models.base import Weight
from latentrt.export.models.deepseek_v2.weights import checkpoint_tensors, weights
from latentrt.export.quantization import BFloat16, BFloat16Int4, Float32, Fp8, Fp8Int4, Int4, Int8
from latentrt.export.quantization.int8 import linear_block
from tests import checkpoints


class Store:
    """Shards as files of a folder, under the key's last part."""

    def __init__(self, folder: Path, done: tuple[str, ...] = ()):
        self.folder, self.done, self.filled = folder, done, []

    def finished(self, key):
        name = f"{key.split('/')[-1]}.safetensors"
        return name if name in self.done else None

    def write(self, key, suffix, fill):
        name = f"{key.split('/')[-1]}{suffix}"
        fill(self.folder / name)
        self.filled.append(name)
        return name


def written(folder: Path, checkpoint: Checkpoint, weight_format) -> tuple[dict, dict]:
    """Where everything lies, and every tensor as the safetensors package reads it."""
    store = Store(folder)
    located = weight_set.write(checkpoint, stored_weights(weights(checkpoint.config)), weight_format, "key", store)
    tensors = {}
    for file in set(store.filled):
        with safe_open(folder / file, "pt") as handle:
            tensors |= {n: handle.get_tensor(n) for n in sorted(handle.keys()) if not n.startswith("_padding")}
    return located, tensors


def expected_tensors(folder: Path, c) -> dict[str, torch.Tensor]:
    """The graph's weights from the checkpoint's tensors, written out once more, in the layout of ONNX Runtime."""
    t = load_file(folder / "model.safetensors")
    result = {n: v.float() for n, v in t.items() if ".experts." not in n and "kv_b_proj" not in n}
    for layer in range(c.num_hidden_layers):
        p = f"model.layers.{layer}."
        kv_b = t[f"{p}self_attn.kv_b_proj.weight"].float().reshape(c.num_attention_heads, -1, c.kv_lora_rank)
        result[f"{p}self_attn.kv_b_proj.w_uk"] = kv_b[:, : c.qk_nope_head_dim]
        result[f"{p}self_attn.kv_b_proj.w_uv"] = kv_b[:, c.qk_nope_head_dim :].mT
        if f"{p}mlp.gate.weight" not in t:
            continue
        experts = range(c.n_routed_experts)
        gate, up, down = (
            torch.stack([t[f"{p}mlp.experts.{e}.{n}_proj.weight"].float() for e in experts]) for n in ("gate", "up", "down")
        )
        result[f"{p}mlp.experts.gate_up_proj"] = torch.empty(len(experts), 2 * c.moe_intermediate_size, c.hidden_size)
        result[f"{p}mlp.experts.gate_up_proj"][:, 0::2], result[f"{p}mlp.experts.gate_up_proj"][:, 1::2] = gate, up
        result[f"{p}mlp.experts.down_proj"] = down
    return result


@pytest.fixture(scope="module")
def opened(small_checkpoint) -> Checkpoint:
    return Checkpoint(small_checkpoint)


def test_float32_is_exact(tmp_path, opened, small_checkpoint):
    located, tensors = written(tmp_path, opened, Float32())
    expected = expected_tensors(small_checkpoint, opened.config)
    assert set(tensors) == set(located) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def test_places_are_aligned_and_true(tmp_path, opened):
    """Reading raw bytes at offset and size, as ONNX Runtime maps them, gives the tensor that safetensors reads."""
    for weight_format in (Float32(), Int8(), Int8(expert_block_size=16), Int4(16)):
        located, tensors = written(tmp_path, opened, weight_format)
        for name, where in located.items():
            assert where.offset % 64 == 0, name
            raw = np.fromfile(tmp_path / where.file, np.uint8, where.size, offset=where.offset)
            assert tuple(tensors[name].shape) == where.shape and tensors[name].dtype == where.dtype
            assert raw.tobytes() == tensors[name].numpy().tobytes(), name


def dequantized(quantized: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(q - 128) * scale over the last axis' blocks, float64."""
    return (quantized.double() - 128) * scale.double()[..., None]


def check_block(values: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor) -> None:
    """values [..., n] in blocks: symmetric, the scale is the largest magnitude / 127, the error half a step at most."""
    restored = dequantized(quantized, scale)
    largest = values.double().abs().amax(-1)
    torch.testing.assert_close(scale.double(), torch.where(largest > 0, largest / 127, 1.0), rtol=1e-6, atol=0)
    # half a step, and the division by a float32 scale may round to the other side of .5: one part in 10^5 more
    assert ((restored - values).abs() <= 0.50001 * scale.double()[..., None]).all()
    assert quantized.min() >= 1  # -127 .. 127: -128 is never used, so that the format is symmetric


def test_int8_linears_and_absorbed(tmp_path, opened, small_checkpoint):
    """Blocks of 16 over 48, 24, 20, 10 ... inputs: the last block is filled with the zero point, which stands for 0."""
    _, tensors = written(tmp_path, opened, Int8(block_size=16))
    expected, seen = expected_tensors(small_checkpoint, opened.config), 0
    for weight in weights(opened.config):
        if weight.role not in ("linear", "absorbed"):
            continue
        values = expected[weight.name].mT if weight.role == "absorbed" else expected[weight.name]  # [..., out, in]
        inputs = values.shape[-1]
        quantized, scale = tensors[weight.name], tensors[f"{weight.name}.scale"]
        assert quantized.shape == (*values.shape[:-1], -(-inputs // 16), 16) and scale.shape == quantized.shape[:-1]
        padded = torch.zeros(*values.shape[:-1], quantized.shape[-2] * 16)
        padded[..., :inputs] = values
        check_block(padded.unflatten(-1, (-1, 16)), quantized, scale)
        assert (quantized.flatten(-2)[..., inputs:] == 128).all()
        seen += 1
    assert seen > 20


@pytest.mark.parametrize("block", [0, 16])
def test_int8_experts(tmp_path, opened, small_checkpoint, block):
    _, tensors = written(tmp_path, opened, Int8(expert_block_size=block))
    expected = expected_tensors(small_checkpoint, opened.config)
    for layer in (1, 2):
        for name in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{name}"
            values, quantized, scale = expected[name], tensors[name], tensors[f"{name}.scale"]
            assert quantized.shape == values.shape
            width = block or values.shape[-1]
            assert scale.shape == (values.shape[:-1] if not block else (*values.shape[:-1], values.shape[-1] // block))
            check_block(
                values.unflatten(-1, (-1, width)), quantized.unflatten(-1, (-1, width)), scale if block else scale[..., None]
            )


def test_norms_router_and_embedding_stay_float32(tmp_path, opened, small_checkpoint):
    _, tensors = written(tmp_path, opened, Int8())
    expected = expected_tensors(small_checkpoint, opened.config)
    plain = [w.name for w in weights(opened.config) if w.role in ("norm", "router", "bias", "embedding")]
    assert len(plain) == 3 * 4 + 2 + 1 + 1  # four norms a layer, two routers, the last norm, the embedding
    assert all(torch.equal(tensors[n], expected[n]) for n in plain)


WEIGHTS = {
    "linear": Weight("w", (5, 37), "linear", (("w",),)), "absorbed": Weight("w", (3, 37, 5), "absorbed", (("w",),)),
    "down": Weight("w", (3, 5, 48), "down", (("w",),)), "gate_up": Weight("w", (3, 8, 48), "gate_up", (("w",),)),
    "norm": Weight("w", (7,), "norm", (("w",),)),
}  # fmt: skip


@pytest.mark.parametrize("role", WEIGHTS)
@pytest.mark.parametrize("weight_format", [Float32(), Int8(), Int8(16), Int8(32, 16)], ids=lambda f: f.key)
def test_decode_undoes_encode(role, weight_format):
    """Within half a step of the largest magnitude that shares a scale; rows of zeros stay zero; no scale is 0."""
    weight = WEIGHTS[role]
    values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    if len(weight.shape) == 3:
        values[1] = 0
    elif len(weight.shape) == 2:
        values[2] = 0
    encoded = weight_format.encode(weight, values)
    stored = weight_format.stored(weight)
    assert [tuple(e.shape) for e in encoded] == [tuple(s.shape) for s in stored]
    assert [e.dtype for e in encoded] == [s.dtype for s in stored]
    decoded = weight_format.decode(weight, encoded)
    assert decoded.shape == weight.shape and decoded.dtype == torch.float32
    quantized = isinstance(weight_format, Int8) and role != "norm"
    bound = 0.50001 * values.abs().max() / 127 if quantized else 0
    assert (decoded - values).abs().max() <= bound
    assert (decoded[values == 0] == 0).all()


def plain_int8(values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of int8, one pass over everything at a time: [..., blocks, block] and scales [..., blocks]."""
    padded = torch.nn.functional.pad(values.float(), (0, -values.shape[-1] % block)).unflatten(-1, (-1, block))
    scale = padded.abs().amax(-1) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (padded / scale[..., None]).round().clamp(-127, 127).add(128).to(torch.uint8), scale


def plain_fp8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of fp8."""
    scale = values.float().abs().amax(-1).clamp_min(1e-10) / 448
    return (values.float() / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def same_bytes(found: list[torch.Tensor], expected: tuple[torch.Tensor, ...]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(f.flatten().view(torch.uint8), e.flatten().view(torch.uint8)) for f, e in pairs)


@pytest.mark.parametrize("size", [1, 1e-5, 1e-40, 1e30], ids=lambda size: f"around {size}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_encoding_is_the_definition_to_the_bit(dtype, size):
    """Over several chunks of rows, with rows of zeros, subnormal and huge values, and inputs that fill no whole block."""
    generator = torch.Generator().manual_seed(3)
    for role, shape in (("linear", (300, 1000)), ("absorbed", (3, 37, 50)), ("gate_up", (2, 130, 1408)), ("down", (2, 70, 96))):
        weight = Weight("w", shape, role, (("w",),))
        values = (torch.randn(shape, generator=generator) * size).to(dtype)
        values = torch.where(torch.isfinite(values), values, 0)
        values[..., 1, :] = 0
        outputs_first = values.transpose(-1, -2) if role == "absorbed" else values
        experts = len(shape) == 3 and role != "absorbed"
        block = shape[-1] if experts else linear_block(outputs_first.shape[-1], 128)
        assert same_bytes(Int8().encode(weight, values), plain_int8(outputs_first, block)), role
        if role != "absorbed":
            assert same_bytes(Fp8().encode(weight, values), plain_fp8(values)), role


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_checkpoints_widen_exactly(tmp_path, small_checkpoint, dtype):
    checkpoints.write(tmp_path / "half", seed=2, dtype=dtype)
    opened = Checkpoint(tmp_path / "half")
    _, tensors = written(tmp_path, opened, Float32())
    for name, tensor in expected_tensors(tmp_path / "half", opened.config).items():
        assert torch.equal(tensors[name], tensor), name


def test_finished_shards_are_not_written_again(tmp_path, opened):
    first = Store(tmp_path)
    everything = stored_weights(weights(opened.config))
    expected = weight_set.write(opened, everything, Int8(), "key", first)
    everything_named = [f"{p}.safetensors" for p in ("embed", *(f"model.layers.{i}" for i in range(3)), "head")]
    assert sorted(first.filled) == sorted(everything_named)
    second = Store(tmp_path, done=("embed.safetensors", "model.layers.1.safetensors"))
    assert weight_set.write(opened, everything, Int8(), "key", second) == expected
    assert sorted(second.filled) == ["head.safetensors", "model.layers.0.safetensors", "model.layers.2.safetensors"]


def test_planned_bytes_are_true(tmp_path, opened):
    """The size of every file, and what progress adds up to."""
    everything = stored_weights(weights(opened.config))
    for weight_format in (Float32(), BFloat16(), Fp8(), Int8(block_size=16), Int4(16), Fp8Int4(16), BFloat16Int4(16)):
        folder, told = tmp_path / weight_format.key, {}
        folder.mkdir()
        weight_set.write(
            opened, everything, weight_format, "key", Store(folder),
            lambda part, size, told=told: told.update({part: told.get(part, 0) + size}),
        )  # fmt: skip
        planned = weight_set.planned_bytes(everything, weight_format)
        assert planned == told == {f.stem: f.stat().st_size for f in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_the_first_element_that_is_not_finite_is_named(dtype):
    file, values = Path("model.safetensors"), torch.ones(50, 70).to(dtype)
    assert finite_or_refuse(values, file, "w") is values
    if dtype != torch.float8_e4m3fn:  # which has no infinity, and little to overflow
        extreme = torch.full((50, 70), torch.finfo(dtype).max, dtype=dtype)  # finite, though its sum is not
        assert finite_or_refuse(extreme, file, "w") is extreme
        values[40, 2], values[41, 3] = float("inf"), float("-inf")
        with pytest.raises(CheckpointError, match=r"tensor w is not finite at \[40, 2\] \(inf\), 2 such"):
            finite_or_refuse(values, file, "w")
    values[7, 69] = float("nan")
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor w is not finite at \[7, 69\] \(nan\)"):
        finite_or_refuse(values, file, "w")


def test_an_error_in_one_slab_ends_all(tmp_path, small_checkpoint):
    """Of several damaged tensors, one is named; no other part is begun."""
    folder = Path(shutil.copytree(small_checkpoint, tmp_path / "damaged"))
    name = "model.layers.0.self_attn.o_proj.weight"
    checkpoints.edit_tensors(folder, lambda t: t[name].__setitem__((1, 2), float("nan")))
    opened, store = Checkpoint(folder), Store(tmp_path)
    with pytest.raises(CheckpointError, match=f"{name} is not finite at .1, 2."):
        weight_set.write(opened, stored_weights(weights(opened.config)), Int8(), "key", store)
    assert "model.layers.0.safetensors" not in store.filled and torch.get_num_threads() > 0


def test_large_slabs_are_cut(tmp_path, opened, monkeypatch):
    """Written a few rows at a time, a set has the same bytes."""
    _, whole = written(tmp_path, opened, Int8())
    monkeypatch.setattr(weight_set, "_SLAB_BYTES", 500)
    _, cut = written(tmp_path, opened, Int8())
    assert all(torch.equal(whole[n], cut[n]) for n in whole)


CHILD = """
import os, sys
from pathlib import Path
from threading import Event, Thread
from latentrt.export import weight_set
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.lowering.onnxruntime.lowering import stored_weights
from latentrt.export.models.deepseek_v2.weights import checkpoint_tensors, weights
from latentrt.export.quantization import Int8
from tests.export.test_weight_set import Store

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
checkpoint = Checkpoint(sys.argv[1])
checkpoint.check()
memory = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
samples, done = [memory()], Event()
def watch():
    while not done.wait(0.001):
        samples.append(memory())
Thread(target=watch).start()
try:
    weight_set.write(checkpoint, stored_weights(weights(checkpoint.config)), Int8(), "k", Store(Path(sys.argv[2])))
finally:
    done.set()
print(max(samples) - samples[0], len(samples))
"""


@pytest.mark.slow
def test_memory_is_bounded_by_slabs(tmp_path):
    """A 200 MB checkpoint of 4 layers of 48 MB with 64 experts; its largest tensor, the embedding, has 16 MB."""
    fields = checkpoints.CONFIG | {
        "hidden_size": 256, "moe_intermediate_size": 512, "n_routed_experts": 64, "n_group": 8, "num_hidden_layers": 5,
        "vocab_size": 32768, "num_attention_heads": 4,
    }  # fmt: skip
    folder = tmp_path / "large"
    folder.mkdir()
    raw = fields | {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(raw))
    shapes = checkpoint_tensors(registry.load(folder))
    save_file({n: torch.full(s, 0.5, dtype=torch.bfloat16) for n, s in shapes.items()}, folder / "model.safetensors")
    size = (folder / "model.safetensors").stat().st_size / 2**20
    assert size > 200
    result = subprocess.run(
        [sys.executable, "-c", CHILD, folder, tmp_path], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert result.returncode == 0, result.stderr
    # Two threads, each with a slab: 16 MB in float32 and what becomes of it. Checkpoint and shards are pages of files.
    peak, samples = map(float, result.stdout.split())
    assert 4 < peak < 130 and samples > 20
