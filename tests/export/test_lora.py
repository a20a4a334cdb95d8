"""LoRA adapters beside a checkpoint's weights, against PEFT's own merge.

tests/lora/*: adapters that PEFT 0.21.2 saved for the checkpoint of tests/checkpoints.py (seed 11), and in merged.safetensors
what its merge_and_unload made of the weights that they change.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.errors import CheckpointError

ADAPTERS = Path(__file__).parent.parent / "lora"


@pytest.fixture
def copy(small_checkpoint, tmp_path) -> Path:
    return shutil.copytree(small_checkpoint, tmp_path / "copy")


def put(folder: Path, name: str, **fields) -> Path:
    """Adds the adapter `name` to a checkpoint; `fields` change its adapter_config.json."""
    config = json.loads((ADAPTERS / name / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(ADAPTERS / name / "adapter_model.safetensors", folder)
    return folder


@pytest.mark.parametrize("name", ["plain", "patterns"])
def test_equals_pefts_merge(small_checkpoint, copy, name):
    """patterns: rank and alpha by pattern, rank-stabilized scaling, a head trained whole."""
    found, base = Checkpoint(put(copy, name)), load_file(small_checkpoint / "model.safetensors")
    merged = load_file(ADAPTERS / name / "merged.safetensors")
    found.check()
    assert merged and any("LoRA adapter" in note for note in found.notes) and not found.is_plain
    for tensor in base:
        expected = merged.get(tensor, base[tensor])
        torch.testing.assert_close(found.read(tensor), expected, rtol=1e-5, atol=1e-6)  # float32 sums of 4 products
        assert tensor in merged or found.read(tensor).equal(base[tensor])


def test_the_digest_covers_the_adapter(copy):
    before = Checkpoint(copy).file_digests()
    after = Checkpoint(put(copy, "plain")).file_digests()
    assert set(after) - set(before) == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(("fields", "word"), [
    ({"use_dora": True}, "DoRA"), ({"peft_type": "IA3"}, "IA3"), ({"bias": "all"}, "bias 'all'"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "stacked experts"),
])  # fmt: skip
def test_what_cannot_be_merged_is_named(copy, fields, word):
    with pytest.raises(CheckpointError, match=f"{word}.*merge_and_unload"):
        Checkpoint(put(copy, "plain", **fields))


def test_an_adapter_of_another_base(copy):
    put(copy, "plain")
    tensors = load_file(copy / "adapter_model.safetensors")
    name = next(n for n in tensors if n.endswith("kv_b_proj.lora_B.weight"))
    save_file(tensors | {name: torch.zeros(7, 4)}, copy / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"\[7, 4\].*does not fit model\.layers\.0\.self_attn\.kv_b_proj\.weight"):
        Checkpoint(copy)
    save_file({n: t for n, t in tensors.items() if n != name}, copy / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"kv_b_proj has only lora_A"):
        Checkpoint(copy)


def test_an_adapter_alone(copy, tmp_path):
    put(copy, "plain")
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"LoRA adapter and no weights of its base.*deepseek-ai/DeepSeek-V2-Lite"):
        Checkpoint(copy)
