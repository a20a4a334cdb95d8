"""The DeepSeek-V2 family as a record."""

from latentrt.export.models.base import Family
from latentrt.export.models.deepseek_v2.config import DeepseekV2Config, parse, restore
from latentrt.export.models.deepseek_v2.model import DecoderLayer, DeepseekV2Step, Embed, Head
from latentrt.export.models.deepseek_v2.weights import checkpoint_tensors, originals, weights


def _counts(c: DeepseekV2Config) -> dict[str, int]:
    experts = {"n_routed_experts": c.n_routed_experts} if c.first_k_dense_replace < c.num_hidden_layers else {}
    return {"num_hidden_layers": c.num_hidden_layers} | experts


FAMILY = Family(
    model_type=DeepseekV2Config.model_type,
    architecture="DeepseekV2ForCausalLM",
    parse=parse,
    restore=restore,
    counts=_counts,
    weights=weights,
    checkpoint_tensors=checkpoint_tensors,
    originals=originals,
    angles=lambda c: dict.fromkeys(("cos", "sin"), c.qk_rope_head_dim // 2),
    embed=Embed,
    layer=DecoderLayer,
    layer_kind=DeepseekV2Config.is_moe_layer,
    head=Head,
    step=DeepseekV2Step,
)
