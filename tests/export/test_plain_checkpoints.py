"""Checkpoints as people have them: what transformers loads, we load to the same bits; what only wrappers changed, too."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.export.checkpoint import INDEX, Checkpoint
from latentrt.export.errors import CheckpointError, ConfigError
from latentrt.export.models.deepseek_v2.model import DeepseekV2Step
from tests import checkpoints, ragged


def stack_experts(tensors: dict) -> None:
    """As transformers 5 saves with save_original_format=False."""
    for layer in (1, 2):
        prefix, count = f"model.layers.{layer}.mlp.experts", 8
        taken = {k: [tensors.pop(f"{prefix}.{e}.{k}_proj.weight") for e in range(count)] for k in ("gate", "up", "down")}
        gate_up = [torch.cat(pair) for pair in zip(taken["gate"], taken["up"], strict=True)]
        tensors |= {f"{prefix}.gate_up_proj": torch.stack(gate_up), f"{prefix}.down_proj": torch.stack(taken["down"])}


def renamed(change):
    def edit(tensors: dict) -> None:
        new = {change(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(new)

    return edit


BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), "model.rotary_emb.inv_freq": torch.zeros(4),
    "model.layers.0.self_attn.rotary_emb.cos_cached": torch.zeros(4), "model.layers.0.self_attn.k_scale": torch.ones(1),
    "model.layers.9.x": torch.zeros(2), "model.layers.0.self_attn.q_a_proj.bias": torch.ones(24),
}  # fmt: skip
# what is done to tensors and config.json; transformers loads all of these to the right weights
AS_TRANSFORMERS = {
    "stacked experts": (stack_experts, {}),
    "no prefix": (renamed(lambda name: name.removeprefix("model.")), {}),
    "prefix twice": (renamed(lambda name: f"model.{name}" if name.startswith("model.") else name), {}),
    "buffers and strangers": (lambda t: t.update(BUFFERS), {}),
    "float64 norm": (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].double()}), {}),
    "fewer layers than stored": (lambda t: None, {"num_hidden_layers": 2}),
    "tied, another head stored": (lambda t: None, {"tie_word_embeddings": True}),
    "tied, no head stored": (lambda t: t.pop("lm_head.weight"), {"tie_word_embeddings": True}),
    "tied, only the head stored": (
        lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}), {"tie_word_embeddings": True}
    ),
    "empty shared experts": (
        lambda t: [t.update({k: v[:0]}) if "down" not in k else t.update({k: v[:, :0]})
                   for k, v in list(t.items()) if "shared_experts" in k], {"n_shared_experts": 0}
    ),
    "attention biases": (
        lambda t: t.update({f"model.layers.{i}.self_attn.{n}.bias": torch.randn(d) for i in range(3)
                            for n, d in (("q_a_proj", 24), ("kv_a_proj_with_mqa", 28), ("o_proj", 48))}),
        {"attention_bias": True},
    ),
}  # fmt: skip


@pytest.fixture
def copy(small_checkpoint, tmp_path) -> Path:
    return shutil.copytree(small_checkpoint, tmp_path / "copy")


@pytest.mark.parametrize("case", AS_TRANSFORMERS)
def test_weights_are_those_that_transformers_loads(copy, case):
    """Logits of our module on our weights, and of transformers on its own reading."""
    change, config = AS_TRANSFORMERS[case]
    checkpoints.edit_tensors(checkpoints.edit_config(copy, **config), change)
    assert ours(copy).sub(theirs(copy)).abs().max() < 2e-5  # float32 sums in another order


def ours(folder: Path) -> torch.Tensor:
    """Logits of our definition at all positions of TOKENS."""
    found = Checkpoint(folder)
    found.check()
    module = DeepseekV2Step(found.config).load_weights(found.read)
    pages = ragged.Pages([len(TOKENS)], 8)
    return torch.from_numpy(ragged.run(ragged.torch_step(module, pages, torch.float32), [TOKENS], [], pages)[0])


def theirs(folder: Path) -> torch.Tensor:
    return checkpoints.reference_logits(checkpoints.reference(folder), TOKENS)


TOKENS = checkpoints.random_tokens([12])[0]
WRAPPERS = ("module.{}", "_orig_mod.{}", "base_model.model.{}", "_fsdp_wrapped_module.{}", "module.module.{}")


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_prefixes_of_training_wrappers_are_taken_off(small_checkpoint, copy, wrapper):
    """transformers would start such tensors at random."""
    checkpoints.edit_tensors(copy, renamed(wrapper.format))
    assert not Checkpoint(copy).is_plain
    same_tensors(copy, small_checkpoint)


def test_wrappers_inside_a_name(small_checkpoint, copy):
    checkpoints.edit_tensors(copy, renamed(lambda name: name.replace("layers.", "layers._checkpoint_wrapped_module.")))
    same_tensors(copy, small_checkpoint)


def same_tensors(folder: Path, original: Path) -> None:
    found, expected = Checkpoint(folder), load_file(original / "model.safetensors")
    found.check()
    assert set(found.tensors) == set(expected)
    assert all(found.read(name).equal(expected[name]) for name in expected)


def test_two_names_of_one_tensor(copy):
    checkpoints.edit_tensors(copy, lambda t: t.update({"module.model.norm.weight": t["model.norm.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight and module\.model|module\.model\.norm\.weight and model"):
        Checkpoint(copy)


@pytest.mark.parametrize("names", [
    ("weights.safetensors",), ("a.safetensors", "b.safetensors"), ("consolidated.safetensors",),
    ("model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"),
    ("pytorch_model-00001-of-00002.safetensors", "pytorch_model-00002-of-00002.safetensors"),
], ids="+".join)  # fmt: skip
def test_files_of_any_name(small_checkpoint, copy, names):
    split(copy, names)
    same_tensors(copy, small_checkpoint)


def split(folder: Path, names: tuple[str, ...]) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for k, name in enumerate(names):
        save_file({n: tensors[n] for n in sorted(tensors)[k :: len(names)]}, folder / name)


def test_a_numbered_shard_is_missing(copy):
    split(copy, ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"))
    with pytest.raises(CheckpointError, match=r"shards are missing: model-00002-of-00003\.safetensors"):
        Checkpoint(copy)


def test_a_consolidated_file_beside_an_index(small_checkpoint, copy):
    """It holds everything a second time, under names of its own or the same."""
    split(copy, ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"))
    weight_map = {n: f.name for f in copy.glob("model-*") for n in load_file(f)}
    (copy / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, copy / "consolidated.safetensors")
    same_tensors(copy, small_checkpoint)
    assert any("consolidated.safetensors not read" in note for note in Checkpoint(copy).notes)


def test_a_hub_cache_points_to_its_snapshot(small_checkpoint, tmp_path):
    root = tmp_path / "models--deepseek-ai--DeepSeek-V2-Lite"
    for name in ("abc", "def"):
        shutil.copytree(small_checkpoint, root / "snapshots" / name)
    with pytest.raises(CheckpointError, match="2 snapshots"):
        Checkpoint(root)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("def")
    assert Checkpoint(root).path == Checkpoint(root / "snapshots").path == root / "snapshots" / "def"


@pytest.mark.parametrize(("make", "words"), [
    (lambda f: None, ["config.json: not found"]),
    (lambda f: shutil.copytree(f.parent / "original", f / "sub"), ["config.json: not found", "the folder that has it", "sub"]),
    (lambda f: (f / "model.safetensors").write_bytes(b""), ["there are weights without it"]),
], ids=["empty", "one level too high", "no config"])  # fmt: skip
def test_advice_about_folders(small_checkpoint, tmp_path, make, words):
    shutil.copytree(small_checkpoint, tmp_path / "original")
    (tmp_path / "given").mkdir()
    make(tmp_path / "given")
    with pytest.raises((CheckpointError, ConfigError)) as error:
        Checkpoint(tmp_path / "given")
    assert all(word in str(error.value) for word in words)


def test_the_name_of_a_hub_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="hf download deepseek-ai/DeepSeek-V2-Lite --local-dir DeepSeek-V2-Lite"):
        Checkpoint("deepseek-ai/DeepSeek-V2-Lite")


def test_a_git_lfs_pointer(copy):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 31\n"
    (copy / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        Checkpoint(copy)


def test_a_leftover_quantization_config(small_checkpoint, copy):
    checkpoints.edit_config(copy, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    same_tensors(copy, small_checkpoint)
    assert any("quantization_config (fp8), but no tensor is quantized" in note for note in Checkpoint(copy).notes)
