"""Stored values that a target computes with are taken over: the weight set holds the checkpoint's own numbers, bit by bit."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.export import weight_set
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.lowering.onnxruntime.lowering import CpuOptions, stored_weights
from latentrt.export.lowering.onnxruntime.lowering import weight_format as format_of
from latentrt.export.models.base import Weight
from latentrt.export.models.deepseek_v2.weights import weights
from latentrt.export.quantization import BFloat16Int4, Fp8, Fp8Int4, Int4, Int8
from latentrt.export.quantization.int4 import BLOCK_SIZE
from latentrt.export.quantization.int4_experts import Int4Experts
from tests import checkpoints
from tests.export import test_gguf
from tests.export.test_quantized import stream
from tests.export.test_weight_set import Store


@pytest.mark.parametrize(("dtype", "weight_format"), [
    (torch.float8_e4m3fn, Fp8()), (torch.int8, Int8()), (torch.int8, Int8(block_size=32, expert_block_size=16)),
], ids=["fp8", "int8", "int8 in blocks"])  # fmt: skip
def test_nothing_is_rounded_twice(small_checkpoint, tmp_path, dtype, weight_format):
    folder = shutil.copytree(small_checkpoint, tmp_path / "c")
    checkpoints.quantize_rows(folder, dtype)
    opened, stored = Checkpoint(folder), load_file(folder / "model.safetensors")
    opened.check()
    assert len(opened.tensors) < len(stored)
    layout = (lambda w: w) if dtype is torch.float8_e4m3fn else stored_weights
    members = layout(weights(opened.config))
    located = weight_set.write(opened, members, weight_format, "k", Store(tmp_path))
    taken = [w for w in members if w.role in ("linear", "gate_up", "down")]
    assert taken
    for weight in taken:
        parts = [weight.name + s.suffix for s in weight_format.stored(weight)]
        found = weight_format.decode(weight, [read(tmp_path, located[part]) for part in parts])
        expected = weight.read(lambda name: stored[name].float() * stored[f"{name}_scale"].float())
        assert found.equal(expected), weight.name


GROUPED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {
    "targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group"}}}}  # fmt: skip


def packed_groups(folder: Path) -> dict[str, torch.Tensor]:
    """Products become random 4-bit codes with a bfloat16 scale per 32 inputs, as compressed-tensors packs them (W4A16).
    Returns all weights, by the formula."""
    rng, plain = np.random.default_rng(0), {}

    def change(tensors: dict) -> None:
        for name, tensor in list(tensors.items()):
            plain[name] = tensor
            if "_proj" in name:
                (out, cols), module = tensor.shape, name.removesuffix(".weight")
                codes = rng.integers(0, 16, (out, cols))
                scale = torch.from_numpy(rng.normal(size=(out, -(-cols // 32)))).bfloat16()
                tensors |= {f"{module}.weight_packed": stream(codes, 4), f"{module}.weight_scale": scale}
                plain[name] = torch.from_numpy(codes - 8).float() * scale.float().repeat_interleave(32, 1)[:, :cols]
                del tensors[name]

    checkpoints.edit_tensors(checkpoints.edit_config(folder, quantization_config=GROUPED), change)
    return plain


def gguf_model(kind: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors, plain = test_gguf.model(test_gguf.Type[kind])
    return test_gguf.write(folder / "m.gguf", test_gguf.metadata(test_gguf.SMALL), tensors), plain


@pytest.mark.parametrize(("kind", "weight_format"), [
    ("W4A16", Fp8Int4(32)), ("Q4_0", BFloat16Int4(16)),
    ("W4A16", Int4(32)), ("W4A16", Int4(16)), ("W4A16", Int8(32, 16)), ("Q4_0", Int4(32)), ("Q4_0", Int4(16)),
    ("Q8_0", Int8(32, 32)),
], ids=lambda value: getattr(value, "key", value))  # fmt: skip
def test_blocks_are_taken_over(tiny_checkpoint, tmp_path, kind, weight_format):
    """Integers with scales per block: where the format's blocks divide the checkpoint's, decoding gives the same float32."""
    if kind == "W4A16":
        folder = shutil.copytree(tiny_checkpoint, tmp_path / "c")
        plain = packed_groups(folder)
    else:
        folder, plain = gguf_model(kind, tmp_path)
    opened = Checkpoint(folder)
    opened.check()
    on_gpu = isinstance(weight_format, Int4Experts)
    members = weights(opened.config) if on_gpu else stored_weights(weights(opened.config))
    (tmp_path / "out").mkdir()
    located = weight_set.write(opened, members, weight_format, "k", Store(tmp_path / "out"))
    bits = {"W4A16": 4, "Q4_0": 4, "Q8_0": 8}[kind]  # all fit where elements are wide enough
    roles = {"gate_up", "down"} if on_gpu else {"linear", "gate_up", "down"}
    taken = [w for w in members if w.role in roles and weight_format.bits_of(w) >= bits]
    assert {w.role for w in taken} == roles
    for weight in taken:
        parts = [weight.name + s.suffix for s in weight_format.stored(weight)]
        found = weight_format.decode(weight, [read(tmp_path / "out", located[part]) for part in parts])
        assert found.equal(weight.read(plain.__getitem__).float()), weight.name


@pytest.mark.parametrize(("kind", "stored"), [("Q4_0", (32, 4)), ("Q8_0", (32, 8)), ("F16", None)])
def test_weights_say_what_a_checkpoint_stores(tmp_path, kind, stored):
    folder, _ = gguf_model(kind, tmp_path)
    assert {w.stored for w in Checkpoint(folder).weights() if w.role in ("linear", "gate_up", "down")} == {stored}


def test_the_formats_blocks_divide_the_checkpoints():
    def chosen(**stored) -> int:
        experts = Weight("e", (2, 256, 256), "gate_up", (("e",),), stored=stored.get("experts"))
        linear = Weight("w", (8, 512), "linear", (("w",),), stored=stored.get("linear"))
        return format_of([experts, linear], CpuOptions("int4")).rows.block_size

    assert {chosen(), chosen(linear=(128, 4)), chosen(linear=(32, 8)), chosen(linear=(512, 4))} == {BLOCK_SIZE}
    assert chosen(experts=(32, 4)) == chosen(linear=(32, 4)) == 32
    assert chosen(linear=(16, 4)) == 16


@pytest.mark.parametrize(("size", "bits", "weight_format", "taken"), [
    (32, 4, Int4(32), True), (128, 4, Int4(32), True), (16, 4, Int4(32), False), (48, 4, Int4(32), False),
    (32, 8, Int4(32), False), (256, 4, Int4(32), True), (32, 8, Int8(), False), (128, 8, Int8(), True), (32, 8, Int8(32), True),
    (32, 2, Int4(32), True), (32, 4, Fp8Int4(32), False), (32, 4, BFloat16Int4(32), False),
])  # fmt: skip
def test_which_blocks_are_taken(size, bits, weight_format, taken):
    weight = Weight("w", (8, 256), "linear", (("w",),))
    assert weight_format.takes_blocks(weight, size, bits) == taken
    if isinstance(weight_format, Int4Experts):
        assert weight_format.takes_blocks(Weight("w", (2, 8, 256), "gate_up", (("w",),)), size, bits)
    assert not weight_format.takes_blocks(Weight("w", (2, 256, 8), "absorbed", (("w",),)), size, bits)


def read(folder: Path, where: weight_set.StoredWeight) -> torch.Tensor:
    raw = (folder / where.file).read_bytes()[where.offset : where.offset + where.size]
    return torch.frombuffer(bytearray(raw), dtype=where.dtype).view(where.shape)


def test_values_of_another_type_are_decoded(small_checkpoint, tmp_path):
    """int8 for an FP8 target: read and quantized as any weight."""
    folder = shutil.copytree(small_checkpoint, tmp_path / "c")
    checkpoints.quantize_rows(folder, torch.int8)
    opened, plain = Checkpoint(folder), shutil.copytree(small_checkpoint, tmp_path / "plain")
    save_file({name: opened.read(name).float() for name in opened.tensors}, plain / "model.safetensors")
    for name, checkpoint in (("a", opened), ("b", Checkpoint(plain))):
        (tmp_path / name).mkdir()
        weight_set.write(checkpoint, weights(checkpoint.config), Fp8(), "k", Store(tmp_path / name))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
