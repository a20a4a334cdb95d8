"""DeepSeek-V2 as the planner's and the simulator's tests take it, and their commands."""

import json
from pathlib import Path

from latentrt.cli import main

ROPE = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 0.707, "mscale_all_dim": 0.707}  # fmt: skip
V2 = {
    "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "vocab_size": 102400, "hidden_size": 5120,
    "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "topk_method": "group_limited_greedy", "scoring_func": "softmax", "n_group": 8, "topk_group": 3,
    "norm_topk_prob": False, "routed_scaling_factor": 16.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 163840,
    "hidden_act": "silu", "rope_theta": 10000, "rope_scaling": ROPE,
}  # fmt: skip


def run(capsys, command: str, *arguments) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `latentrt command arguments`."""
    code = main([command, *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def config_file(folder: Path) -> Path:
    """V2's config.json and nothing else, as people download it."""
    file = folder / "config.json"
    file.write_text(json.dumps(V2))
    return file
