"""Random Hugging Face checkpoints of small models, written by transformers, and transformers as their reference.

Weights are larger than transformers' own start values, so that an error in any part of the model shows in the logits.
"""

import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# No two sizes are equal where the model allows it, and few are powers of two: a swapped dimension is an error.
CONFIG = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 56, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 3, "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 10, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "topk_method": "group_limited_greedy", "scoring_func": "softmax", "n_group": 4, "topk_group": 2,
    "norm_topk_prob": False, "routed_scaling_factor": 1.7, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
    "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "rope_parameters": YARN,
}  # fmt: skip


def write(folder: Path, seed: int = 0, *, dtype: torch.dtype = torch.float32, shard_size: str = "1GB", **overrides) -> Path:
    """Writes a random checkpoint of CONFIG with `overrides` into `folder` and returns it."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    _no_progress()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zero-element shared experts
        model = DeepseekV2ForCausalLM(DeepseekV2Config(**CONFIG | overrides)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else noise * _std(name))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def _no_progress() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _std(name: str) -> float:
    """Router logits that differ by whole units, biases that matter, products that keep the size of their input."""
    if name.endswith("mlp.gate.weight"):
        return 0.4
    return 0.3 if name.endswith("bias") or "embed_tokens" in name else 0.12


def edit_config(folder: Path, **fields) -> Path:
    """Sets fields of config.json; a field set to `...` is taken out."""
    raw = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return folder


def edit_tensors(folder: Path, change) -> Path:
    """Rewrites model.safetensors: `change` edits the dictionary of its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reference(folder: Path):
    """transformers' model of a checkpoint, float32, eager attention."""
    from transformers import DeepseekV2ForCausalLM

    _no_progress()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DeepseekV2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def reference_logits(model, tokens: list[int]) -> torch.Tensor:
    """[T, vocab_size] of one sequence."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


def random_tokens(lengths: list[int], seed: int = 0, vocab_size: int = CONFIG["vocab_size"]) -> list[list[int]]:
    """Random token ids, one list a sequence."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


ROW_FORMATS = {
    torch.float8_e4m3fn: {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"g": {
        "targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}}}},
    torch.int8: {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"g": {
        "targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}}}},
}  # fmt: skip


def quantize_rows(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Products become random values of `dtype`, whose largest is far from the format's, with a scale per row, as
    compressed-tensors stores them. Returns all weights in float32, by the formula."""
    generator = torch.Generator().manual_seed(0)

    def change(tensors: dict) -> None:
        for name, tensor in list(tensors.items()):
            if "_proj" in name:
                values = torch.randint(-100, 101, tensor.shape, generator=generator).float()
                tensors[name] = (values / 3 if dtype is torch.float8_e4m3fn else values).to(dtype)
                tensors[f"{name}_scale"] = torch.rand(len(tensor), 1, generator=generator).bfloat16() * 1e-2 + 1e-4

    edit_tensors(edit_config(folder, quantization_config=ROW_FORMATS[dtype]), change)
    stored = load_file(folder / "model.safetensors")
    scale = {name: stored.pop(f"{name}_scale").float() for name in list(stored) if f"{name}_scale" in stored}
    return {name: tensor.float() * scale.get(name, 1.0) for name, tensor in stored.items()}
