"""The DeepSeek-V2 family as a record. Its modules are imported when one is made: a config is read without torch."""

from collections.abc import Callable
from importlib import import_module

from latentrt.export.models.base import Family
from latentrt.export.models.deepseek_v2.config import DeepseekV2Config, parse, restore
from latentrt.export.models.deepseek_v2.weights import checkpoint_tensors, originals, weights


def _made_by(name: str) -> Callable:
    """The class `name` of model.py."""

    def make(*args, **kwargs):
        return getattr(import_module("latentrt.export.models.deepseek_v2.model"), name)(*args, **kwargs)

    return make


def _counts(c: DeepseekV2Config) -> dict[str, int]:
    experts = {"n_routed_experts": c.n_routed_experts} if c.first_k_dense_replace < c.num_hidden_layers else {}
    return {"num_hidden_layers": c.num_hidden_layers} | experts


def _sizes(c: DeepseekV2Config) -> dict[str, tuple[str, int]]:
    first, moe = "model.layers.0", f"model.layers.{c.first_k_dense_replace}.mlp"
    embedding, q_norm = "model.embed_tokens.weight", f"{first}.self_attn.q_a_layernorm.weight"
    return {
        "vocab_size": (embedding, 0), "hidden_size": (embedding, 1), "q_lora_rank": (q_norm, 0),
        "kv_lora_rank": (f"{first}.self_attn.kv_a_layernorm.weight", 0), "n_routed_experts": (f"{moe}.gate.weight", 0),
        "moe_intermediate_size": (f"{moe}.experts.0.gate_proj.weight", 0),
        "intermediate_size": (f"{first}.mlp.gate_proj.weight", 0),
    }  # fmt: skip


def _rank_refusal(c: DeepseekV2Config, ranks: int) -> str:
    if c.first_k_dense_replace >= c.num_hidden_layers:
        return "1 (the model has no experts to share)"
    if c.n_routed_experts % ranks == 0:
        return ""
    divisors = [n for n in range(1, c.n_routed_experts + 1) if c.n_routed_experts % n == 0]
    return f"{', '.join(map(str, divisors))} (divisors of n_routed_experts, which is {c.n_routed_experts})"


FAMILY = Family(
    model_type=DeepseekV2Config.model_type,
    architectures="DeepseekV2",
    parse=parse,
    restore=restore,
    counts=_counts,
    sizes=_sizes,
    weights=weights,
    checkpoint_tensors=checkpoint_tensors,
    originals=originals,
    angles=lambda c: dict.fromkeys(("cos", "sin"), c.qk_rope_head_dim // 2),
    embed=_made_by("Embed"),
    layer=_made_by("DecoderLayer"),
    rank_refusal=_rank_refusal,
    layer_kind=DeepseekV2Config.is_moe_layer,
    head=_made_by("Head"),
    step=_made_by("DeepseekV2Step"),
)
