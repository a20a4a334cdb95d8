"""Writes GGUF files as llama.cpp's converter does, from a config.json and tensors."""

import json
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from latentrt.export.checkpoint import gguf_files

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-deepseek-v2"
BOS, EOS = "<\uff5cbegin▁of▁sentence\uff5c>", "<\uff5cend▁of▁sentence\uff5c>"
NAMES = {new: old for old, new in gguf_files.LAYER.items()}
EXPERTS = {new: old for old, new in gguf_files.EXPERTS.items()}


def metadata(c: dict) -> dict:
    """What llama.cpp's converter writes for a config.json, absorbed attention included."""
    rope, latent = c["qk_rope_head_dim"], c["kv_lora_rank"]
    found = {
        "block_count": c["num_hidden_layers"], "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"], "feed_forward_length": c["intermediate_size"],
        "attention.head_count": c["num_attention_heads"], "attention.head_count_kv": 1,
        "rope.freq_base": float(c["rope_theta"]),
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"], "expert_used_count": c["num_experts_per_tok"],
        "leading_dense_block_count": c["first_k_dense_replace"], "attention.kv_lora_rank": latent,
        "attention.q_lora_rank": c["q_lora_rank"], "attention.key_length": latent + rope, "attention.value_length": latent,
        "attention.key_length_mla": c["qk_nope_head_dim"] + rope, "attention.value_length_mla": c["v_head_dim"],
        "expert_feed_forward_length": c["moe_intermediate_size"], "expert_count": c["n_routed_experts"],
        "expert_shared_count": c["n_shared_experts"], "expert_weights_scale": float(c["routed_scaling_factor"]),
        "expert_weights_norm": True if c["norm_topk_prob"] else None, "rope.dimension_count": rope, "expert_gating_func": 1,
        "expert_group_count": c["n_group"], "expert_group_used_count": c["topk_group"],
    }  # fmt: skip
    if scaling := c["rope_scaling"]:
        found |= {
            "rope.scaling.type": "yarn", "rope.scaling.factor": float(scaling["factor"]),
            "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
            "rope.scaling.yarn_log_multiplier": 0.1 * scaling["mscale_all_dim"],
        }  # fmt: skip
    return {f"deepseek2.{k}": v for k, v in found.items() if v is not None} | {"tokenizer.ggml.eos_token_id": c["eos_token_id"]}


def write(file: Path, fields: dict, tensors: dict[str, tuple[np.ndarray, Type]], architecture: str = "deepseek2") -> Path:
    """A GGUF file of already quantized tensors."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def vocabulary(pre: str = "gpt-2", **more) -> dict:
    """Metadata of the example's tokenizer, as llama.cpp's converter writes it."""
    raw = json.loads((EXAMPLE / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"] | {t["content"]: t["id"] for t in raw["added_tokens"]}
    special = {t["id"] for t in raw["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": merges, "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": "{{ messages }}",
    } | more  # fmt: skip


def tensors_of(checkpoint) -> dict[str, tuple[np.ndarray, Type]]:
    """All tensors of an opened checkpoint in F32, under GGUF's names."""
    c, found, experts = checkpoint.config, {}, {}
    whole = {new: old for old, new in gguf_files.WHOLE.items()}
    for name in checkpoint.tensors:
        value, parts = checkpoint.read(name).float().numpy(), name.split(".")
        if name in whole:
            found[whole[name]] = value
            continue
        layer, inner = f"blk.{parts[2]}", ".".join(parts[3:-1])
        if ".experts." in name:
            experts.setdefault(f"{layer}.{EXPERTS[parts[-2]]}.weight", []).append((int(parts[5]), value))
        elif inner == "self_attn.kv_b_proj":
            both = value.reshape(c.num_attention_heads, -1, c.kv_lora_rank)
            found[f"{layer}.attn_k_b.weight"] = both[:, : c.qk_nope_head_dim].transpose(0, 2, 1)
            found[f"{layer}.attn_v_b.weight"] = both[:, c.qk_nope_head_dim :]
        else:
            found[f"{layer}.{NAMES[inner]}.weight"] = value
    found |= {name: np.stack([value for _, value in sorted(rows, key=lambda r: r[0])]) for name, rows in experts.items()}
    return {name: (np.ascontiguousarray(value), Type.F32) for name, value in found.items()}
