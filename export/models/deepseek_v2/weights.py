"""The weights of DeepSeek-V2's step graph: names, shapes, roles, and the checkpoint tensors that each is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from latentrt.export.models.base import Weight
from latentrt.export.models.deepseek_v2.config import DeepseekV2Config

if TYPE_CHECKING:
    from torch import Tensor


def weights(c: DeepseekV2Config, rotated: bool = False) -> list[Weight]:
    """Every weight of the step graph, in the order of the data's way, named as the graph's initializers are.

    rotated: of the same model with latents in the basis of plugins/cache_formats/rotation.py.
    """
    embedding, head = ("model.embed_tokens.weight",), ("lm_head.weight",)  # a tied one too: the checkpoint knows its place
    result = [Weight("model.embed_tokens.weight", (c.vocab_size, c.hidden_size), "embedding", (embedding,))]
    for i in range(c.num_hidden_layers):
        result += _layer_weights(c, i)
    result.append(_norm("model.norm", c.hidden_size))
    result.append(Weight("lm_head.weight", (c.vocab_size, c.hidden_size), "head", (head,)))
    return [_rotated(c, weight) for weight in result] if rotated else result


def _rotated(c: DeepseekV2Config, weight: Weight) -> Weight:
    """The weight in the basis in which packed caches store tokens; most are the same there.

    Latents are rotated. Pairs of k_pe, which share a scale, are multiplied by powers of two that make them about equally large,
    and those of q_pe divided by them: a rotation by RoPE does not see it.
    """
    from latentrt.plugins.cache_formats.rotation import rotate

    module, _, kind = weight.name.rpartition(".")
    prefix, _, name = module.rpartition(".")
    norm, down = f"{prefix}.kv_a_layernorm.weight", f"{prefix}.kv_a_proj_with_mqa.weight"
    before = f"{prefix.removesuffix('.self_attn')}.input_layernorm.weight"

    def changed(make: Callable[..., Tensor], *more: str) -> Weight:
        return replace(weight, sources=tuple((*group, *more) for group in weight.sources), make=make, computed=True)

    def tokens(rows: Tensor, down: Tensor, gain: Tensor) -> Tensor:  # kv_a_proj_with_mqa's weight or bias
        latent, k_pe = rows.float().split([c.kv_lora_rank, c.qk_rope_head_dim])
        factors = _pair_factors(c, down, gain).view(-1, *[1] * (rows.dim() - 1))
        return _stacked(rotate(latent, 0), k_pe * factors)

    def queries(q: Tensor, down: Tensor, gain: Tensor) -> Tensor:
        heads = q.float().unflatten(0, (c.num_attention_heads, c.qk_head_dim))
        nope, q_pe = heads.split([c.qk_nope_head_dim, c.qk_rope_head_dim], 1)
        return _stacked(nope, q_pe / _pair_factors(c, down, gain)[:, None], 1).flatten(0, 1)

    def absorbed(kv_b: Tensor, gain: Tensor) -> Tensor:
        value, gain = weight.make(kv_b.float()), gain.float()
        return rotate(value * gain, -1) if kind == "w_uk" else rotate(value * gain[:, None], -2)

    if name == "kv_a_proj_with_mqa" and kind == "weight":
        return changed(lambda down, gain: tokens(down, down, gain), before)
    if name == "kv_a_proj_with_mqa":
        return changed(tokens, down, before)
    if name == "kv_a_layernorm":
        return changed(lambda gain: gain.new_ones(gain.shape))
    if name in ("q_proj", "q_b_proj"):
        return changed(queries, down, before)
    return changed(absorbed, norm) if name == "kv_b_proj" else weight


def _pair_factors(c: DeepseekV2Config, down: Tensor, gain: Tensor) -> Tensor:
    """Powers of two [qk_rope_head_dim], the same for both of a pair of k_pe, with which all pairs have about the same length.

    How long they are is judged by kv_a_proj_with_mqa's rows, times the gain of the norm before it.
    """
    rows = (down[c.kv_lora_rank :].float() * gain.float()).unflatten(0, (-1, 2))
    length = rows.square().sum((1, 2)).sqrt()
    logs = length.where(length > 0, length.new_ones(())).log2()
    return (logs.mean() - logs).round().clamp(-12, 12).exp2().repeat_interleave(2)


def checkpoint_tensors(c: DeepseekV2Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a checkpoint with this configuration has to hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    kv_b = (c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    for weight in weights(c):
        for group in weight.sources:
            for name in group:
                if weight.role == "absorbed":
                    shapes[name] = kv_b
                elif weight.role == "gate_up":
                    shapes[name] = (c.moe_intermediate_size, c.hidden_size)
                else:
                    shapes[name] = weight.shape[1:] if weight.role == "down" else weight.shape
    return shapes


def originals(found: Iterable[tuple[Weight, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The way back: (checkpoint name, tensor) of all weights, given in the order of `weights` with their values.

    kv_b_proj is put together from w_uk and w_uv, stacked experts are taken apart into gate_proj, up_proj and down_proj.
    lm_head is always given, since a tied one may be stored otherwise than the embedding.
    """
    w_uk = None
    for weight, value in found:
        if weight.role == "absorbed":
            if w_uk is None:
                w_uk = value  # [H, nope, kv_lora_rank]; w_uv [H, kv_lora_rank, v] comes next
                continue
            yield weight.sources[0][0], _stacked(w_uk, value.transpose(1, 2), 1).flatten(0, 1).contiguous()
            w_uk = None
        elif weight.role == "gate_up":
            for expert, (gate, up) in enumerate(weight.sources):
                for name, rows in zip((gate, up), value[expert].chunk(2), strict=True):
                    yield name, rows.contiguous()
        elif weight.role == "down":
            for expert, (down,) in enumerate(weight.sources):
                yield down, value[expert].contiguous()
        else:
            yield weight.name, value.contiguous()


def _stacked(first: Tensor, second: Tensor, dim: int = 0) -> Tensor:
    import torch

    return torch.cat([first, second], dim)


def _norm(prefix: str, size: int) -> Weight:
    return Weight(f"{prefix}.weight", (size,), "norm", ((f"{prefix}.weight",),))


def _linear(prefix: str, inputs: int, outputs: int, bias: bool = False) -> list[Weight]:
    found = [Weight(f"{prefix}.weight", (outputs, inputs), "linear", ((f"{prefix}.weight",),))]
    if bias:
        found.append(Weight(f"{prefix}.bias", (outputs,), "bias", ((f"{prefix}.bias",),)))
    return found


def _mlp(prefix: str, hidden_size: int, intermediate_size: int) -> list[Weight]:
    return [
        *_linear(f"{prefix}.gate_proj", hidden_size, intermediate_size),
        *_linear(f"{prefix}.up_proj", hidden_size, intermediate_size),
        *_linear(f"{prefix}.down_proj", intermediate_size, hidden_size),
    ]


def _layer_weights(c: DeepseekV2Config, layer: int) -> list[Weight]:
    prefix = f"model.layers.{layer}"
    mlp = _moe(c, f"{prefix}.mlp") if c.is_moe_layer(layer) else _mlp(f"{prefix}.mlp", c.hidden_size, c.intermediate_size)
    return [
        _norm(f"{prefix}.input_layernorm", c.hidden_size),
        *_attention(c, f"{prefix}.self_attn"),
        _norm(f"{prefix}.post_attention_layernorm", c.hidden_size),
        *mlp,
    ]


def _attention(c: DeepseekV2Config, prefix: str) -> list[Weight]:
    heads, nope = c.num_attention_heads, c.qk_nope_head_dim
    if c.q_lora_rank is None:
        found = _linear(f"{prefix}.q_proj", c.hidden_size, heads * c.qk_head_dim)
    else:
        found = _linear(f"{prefix}.q_a_proj", c.hidden_size, c.q_lora_rank, c.attention_bias)
        found.append(_norm(f"{prefix}.q_a_layernorm", c.q_lora_rank))
        found += _linear(f"{prefix}.q_b_proj", c.q_lora_rank, heads * c.qk_head_dim)
    latent_and_rope = c.kv_lora_rank + c.qk_rope_head_dim
    found += _linear(f"{prefix}.kv_a_proj_with_mqa", c.hidden_size, latent_and_rope, c.attention_bias)
    found.append(_norm(f"{prefix}.kv_a_layernorm", c.kv_lora_rank))

    def per_head(kv_b: Tensor) -> Tensor:  # [H * (nope + v), kv_lora_rank] -> [H, nope + v, kv_lora_rank]
        return kv_b.unflatten(0, (heads, nope + c.v_head_dim))

    source = ((f"{prefix}.kv_b_proj.weight",),)
    found.append(
        Weight(
            f"{prefix}.kv_b_proj.w_uk", (heads, nope, c.kv_lora_rank), "absorbed", source,
            lambda kv_b: per_head(kv_b)[:, :nope],
        )
    )  # fmt: skip
    found.append(
        Weight(
            f"{prefix}.kv_b_proj.w_uv", (heads, c.kv_lora_rank, c.v_head_dim), "absorbed", source,
            lambda kv_b: per_head(kv_b)[:, nope:].transpose(1, 2),
        )
    )  # fmt: skip
    return found + _linear(f"{prefix}.o_proj", heads * c.v_head_dim, c.hidden_size, c.attention_bias)


def _moe(c: DeepseekV2Config, prefix: str) -> list[Weight]:
    experts, inner, hidden = c.n_routed_experts, c.moe_intermediate_size, c.hidden_size
    expert = [f"{prefix}.experts.{e}" for e in range(experts)]
    found = [
        Weight(f"{prefix}.gate.weight", (experts, hidden), "router", ((f"{prefix}.gate.weight",),)),
        Weight(
            f"{prefix}.experts.gate_up_proj", (experts, 2 * inner, hidden), "gate_up",
            tuple((f"{e}.gate_proj.weight", f"{e}.up_proj.weight") for e in expert),
            lambda gate, up: _stacked(gate, up)[None],
        ),
        Weight(
            f"{prefix}.experts.down_proj", (experts, hidden, inner), "down",
            tuple((f"{e}.down_proj.weight",) for e in expert),
            lambda down: down[None],
        ),
    ]  # fmt: skip
    if c.shared_intermediate_size:
        found += _mlp(f"{prefix}.shared_experts", hidden, c.shared_intermediate_size)
    return found
