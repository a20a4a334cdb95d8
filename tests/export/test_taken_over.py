"""Stored values that a target computes with are taken over: the weight set holds the checkpoint's own numbers, bit by bit."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.export import weight_set
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.lowering.onnxruntime.lowering import stored_weights
from latentrt.export.models.deepseek_v2.weights import weights
from latentrt.export.quantization import Fp8, Int8
from tests import checkpoints
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
