"""config.json out of the metadata of a GGUF file of architecture deepseek2, as llama.cpp's converter writes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latentrt.export.checkpoint.base import StoredTensor
from latentrt.export.errors import CheckpointError

ARCHITECTURE = "deepseek2"
SOFTMAX = 1  # expert_gating_func; absent in older files, which are all of DeepSeek-V2
START = "start from the Hugging Face checkpoint"
_REQUIRED = object()


def config(file: Path, metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> dict:
    """The fields of config.json that models read. Raises CheckpointError for what is another model, or is missing."""
    found = metadata.get("general.architecture")
    if found != ARCHITECTURE:
        raise CheckpointError(f"{file}: general.architecture is {found!r}; accepted: {ARCHITECTURE!r}")
    _refuse_successors(file, metadata, tensors)
    read = _Fields(file, metadata)
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file}: tensor token_embd.weight is missing; give all parts of the model")
    heads = read("attention.head_count")
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "vocab_size": embedding.shape[0],
        "hidden_size": read("embedding_length"),
        "intermediate_size": read("feed_forward_length"),
        "num_hidden_layers": read("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "rms_norm_eps": _decimal(read("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": read("context_length"),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        **_attention(read),
        **_experts(read),
        **_rope(file, read),
    }


class _Fields:
    """Metadata of the architecture, by key."""

    def __init__(self, file: Path, metadata: Mapping[str, Any]):
        self._file, self._metadata = file, metadata

    def __call__(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._metadata.get(f"{ARCHITECTURE}.{key}", default)
        if value is _REQUIRED:
            raise CheckpointError(f"{self._file}: metadata {ARCHITECTURE}.{key} is missing; convert the checkpoint again")
        if isinstance(value, (list, str)) and key != "rope.scaling.type":
            raise CheckpointError(f"{self._file}: metadata {ARCHITECTURE}.{key} is {value!r}, expected a number")
        return value


def _refuse_successors(file: Path, metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Later models (DeepSeek-V3, Kimi, GLM) use the same architecture name."""
    key = f"{ARCHITECTURE}.expert_gating_func"
    if metadata.get(key, SOFTMAX) not in (0, SOFTMAX):
        raise CheckpointError(f"{file}: {key} is {metadata[key]}; accepted: {SOFTMAX} (softmax): this is no DeepSeek-V2")
    bias = next((name for name in tensors if "exp_probs_b" in name), None)
    if bias:
        raise CheckpointError(f"{file}: tensor {bias} corrects the router as DeepSeek-V3 does: this is no DeepSeek-V2")
    for field in ("nextn_predict_layers", "attention.temperature_scale", "attention.indexer.top_k"):
        if metadata.get(f"{ARCHITECTURE}.{field}"):
            raise CheckpointError(f"{file}: metadata {ARCHITECTURE}.{field} is given: this is no DeepSeek-V2")


def _decimal(value: float) -> float:
    """The shortest decimal number that is this float32: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value)))


def _attention(read: _Fields) -> dict:
    """Head sizes: `key_length_mla`, or `key_length` of files from before llama.cpp absorbed kv_b_proj."""
    rope = read("rope.dimension_count")
    key = read("attention.key_length_mla", None) or read("attention.key_length")
    return {
        "q_lora_rank": read("attention.q_lora_rank", None) or None,
        "kv_lora_rank": read("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": key - rope,
        "v_head_dim": read("attention.value_length_mla", None) or read("attention.value_length"),
    }


def _experts(read: _Fields) -> dict:
    """Files from before llama.cpp knew groups of experts say nothing of them: read as it runs them, without groups."""
    groups = read("expert_group_count", None) or 1
    return {
        "n_routed_experts": read("expert_count"),
        "num_experts_per_tok": read("expert_used_count"),
        "n_shared_experts": read("expert_shared_count", None),
        "moe_intermediate_size": read("expert_feed_forward_length"),
        "first_k_dense_replace": read("leading_dense_block_count"),
        "moe_layer_freq": 1,
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
        "scoring_func": "softmax",
        "n_group": groups,
        "topk_group": read("expert_group_used_count", None) or 1,
        "norm_topk_prob": bool(read("expert_weights_norm", False)),
        "routed_scaling_factor": _decimal(read("expert_weights_scale", 0.0) or 1.0),
    }


def _rope(file: Path, read: _Fields) -> dict:
    """The converter stores 0.1 * mscale_all_dim and not mscale: as in llama.cpp, the two are taken to be equal."""
    kind = read("rope.scaling.type", "none")
    found = {"rope_theta": _decimal(read("rope.freq_base", 10000.0)), "rope_scaling": None}
    if kind == "none":
        return found
    if kind != "yarn":
        raise CheckpointError(f"{file}: rope.scaling.type is {kind!r}; accepted: 'none', 'yarn'; {START}")
    mscale = round(_decimal(read("rope.scaling.yarn_log_multiplier")) * 10, 6)
    scaling = {
        "type": "yarn",
        "factor": _decimal(read("rope.scaling.factor")),
        "original_max_position_embeddings": read("rope.scaling.original_context_length"),
        "beta_fast": _decimal(read("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": _decimal(read("rope.scaling.yarn_beta_slow", 1.0)),
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }
    return found | {"rope_scaling": scaling}
