"""The audit of the reference: does this transformers build compute what the checkpoint's config.json says?

transformers' own classes are built small (a few heads, narrow layers) with everything that decides a rule kept: RoPE
parameters, qk head dimensions, experts, groups, top-k, scaling. Their outputs are compared with `formulas`. Where they
differ, the formulas are made wrong one rule at a time until they agree, so that the error names the defect.
"""

import torch

from latentrt.export.models.deepseek_v2.config import DeepseekV2Config
from latentrt.validation.reference.audit.attention import check_attention, check_norm
from latentrt.validation.reference.audit.moe import check_experts, check_routing, check_ties
from latentrt.validation.reference.audit.probe import SMALL, build, run_layer, small_config, topk_of
from latentrt.validation.reference.audit.verdict import NOTICEABLE, AuditCheck, refuse
from latentrt.validation.reference.formulas import rotation_factor

__all__ = ["AuditCheck", "audit", "topk_of"]


def audit(config: DeepseekV2Config, raw: dict) -> list[AuditCheck]:
    """Audits transformers for a checkpoint with config.json `raw`, parsed as `config`. Raises ReferenceRefused."""
    structure(config, raw)
    one_mscale(config)
    has_moe = any(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    small = small_config(config)
    ordinary = run_layer(small, raw, moe=has_moe, latent_gain=1.0)
    faint = run_layer(small, raw, moe=has_moe, latent_gain=1e-3)
    checks = check_attention(small, {"ordinary": ordinary, "faint latents": faint})
    checks.append(check_norm(small, ordinary))
    if has_moe:
        checks += check_routing(small, ordinary)
        checks.append(check_experts(small, ordinary))
        checks.append(check_ties(small, raw))
    return checks


def one_mscale(config: DeepseekV2Config) -> None:
    """With one of the two mscales the model's own code and transformers turn by different factors: neither is the reference."""
    rope = config.rope
    if rope.rope_type != "yarn" or rope.given_attention_factor or bool(rope.mscale) == bool(rope.mscale_all_dim):
        return
    own, theirs = rotation_factor(config), rope.attention_factor
    if abs(own - theirs) > NOTICEABLE:
        has, lacks = ("mscale", "mscale_all_dim") if rope.mscale else ("mscale_all_dim", "mscale")
        refuse(
            f"the config has {has} without {lacks}: DeepSeek's modeling_deepseek.py then multiplies cos and sin by {own:.4g}, "
            f"transformers (and this bundle) by {theirs:.4g}", "mscale",
        )  # fmt: skip


def structure(config: DeepseekV2Config, raw: dict) -> None:
    """Are the MoE layers of transformers' model those of the config (first_k_dense_replace, moe_layer_freq)?"""
    with torch.device("meta"):
        model = build(raw, dict(SMALL, num_hidden_layers=config.num_hidden_layers))
    found = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    expected = [config.is_moe_layer(i) for i in range(config.num_hidden_layers)]
    if found != expected:
        wrong = next(i for i, (f, e) in enumerate(zip(found, expected, strict=True)) if f != e)
        field = "moe_layer_freq" if config.moe_layer_freq != 1 else "first_k_dense_replace"
        kind = {True: "MoE", False: "dense"}
        refuse(f"{field}: layer {wrong} is {kind[found[wrong]]}, expected {kind[expected[wrong]]}", field)
