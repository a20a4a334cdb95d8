"""The tensors that are looked at, in the order of the data's way: the module of the checkpoint, and the weights behind each."""

from collections.abc import Mapping
from dataclasses import dataclass

from latentrt.export.models.base import Weight


@dataclass(frozen=True)
class Tensor:
    """`module` and `weights` below the part's own name; weights are the graph's. `what`: words where a module makes several."""

    module: str
    weights: tuple[str, ...] = ()
    what: str = ""


_AT, _MLP = "self_attn", "mlp"
END = "cached in the end"


def _linear(module: str) -> Tensor:
    return Tensor(module, (f"{module}.weight",))


LAYER: dict[str, Tensor] = {
    "input_layernorm": _linear("input_layernorm"),
    **{name: _linear(f"{_AT}.{name}") for name in ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa")},
    "latent": _linear(f"{_AT}.kv_a_layernorm"),
    "k_pe": Tensor(f"{_AT}.rotary_emb", what="rotated keys"),
    "cached latent": Tensor(_AT, what="latents as written to the cache"),
    "cached k_pe": Tensor(_AT, what="k_pe as written to the cache"),
    "q_pe": Tensor(f"{_AT}.rotary_emb", what="rotated queries"),
    "q_latent": Tensor(f"{_AT}.kv_b_proj", (f"{_AT}.kv_b_proj.w_uk",), "queries in the latent space"),
    "attended": Tensor(_AT, what="attention over the cached latents"),
    "values": Tensor(f"{_AT}.kv_b_proj", (f"{_AT}.kv_b_proj.w_uv",), "attended values"),
    "attention": _linear(f"{_AT}.o_proj"),
    END: Tensor(_AT, what="the cache after all steps"),
    "post_attention_layernorm": _linear("post_attention_layernorm"),
    "router_logits": _linear(f"{_MLP}.gate"),
    "topk_ids": Tensor(f"{_MLP}.gate", what="chosen experts"),
    "topk_weights": Tensor(f"{_MLP}.gate", what="weights of the chosen experts"),
    "experts": Tensor(
        f"{_MLP}.experts", (f"{_MLP}.experts.gate_up_proj", f"{_MLP}.experts.down_proj"), "sum of the chosen experts"
    ),
    **{f"shared_experts.{n}": _linear(f"{_MLP}.shared_experts.{n}") for n in ("gate_proj", "up_proj", "down_proj")},
    **{name: _linear(f"{_MLP}.{name}") for name in ("gate_proj", "up_proj", "down_proj")},
    "mlp": Tensor(_MLP),
    "hidden": Tensor("", what="hidden state after the layer"),
}
EMBED = {
    "embed_tokens": Tensor("model.embed_tokens", ("model.embed_tokens.weight",)),
    "cos": Tensor("model.rotary_emb", what="cosines"),
    "sin": Tensor("model.rotary_emb", what="sines"),
}
HEAD = {"logits": Tensor("lm_head", ("model.norm.weight", "lm_head.weight"))}


def weights_behind(
    known: Mapping[str, Tensor], tap: str, seen: set[str], weights: Mapping[str, Weight], part: str
) -> list[Weight]:
    """Weights of the graph between the last tensor that was seen and this one."""
    names, found = list(known), []
    for name in names[: names.index(tap) + 1]:
        found += known[name].weights
        if name in seen and name != tap:
            found = []
    prefix = f"{part}." if known is LAYER else ""
    return [weights[f"{prefix}{name}"] for name in found if f"{prefix}{name}" in weights]
