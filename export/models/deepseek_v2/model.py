"""DeepSeek-V2 as step graphs: multi-head latent attention over a paged latent cache, and DeepSeekMoE (arXiv 2405.04434).

A step takes T token rows of B sequences (ragged: rows query_starts[b] .. query_starts[b + 1] belong to sequence b).
Attention has two forms over the same weights and cache. Absorbed: kv_b_proj's key half maps queries into the latent space
(w_uk), its value half maps the attended latent back (w_uv). Expanded: mla_prefill makes keys and values of the latent.
Embedding, layers and head are modules of their own, so that each is traced once and stamped.

Several ranks share the routed experts: each has its own sequences and caches, all weights but those of experts, and an equal
share of these. It routes its own rows, so that no near tie falls another way elsewhere; the rows of all ranks with their
choices are gathered, every rank adds up what its experts make of them, and the sums go back to the rows' ranks.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentrt.export.models.base import Read, weight_name
from latentrt.export.models.deepseek_v2.config import DeepseekV2Config
from latentrt.export.models.deepseek_v2.weights import weights
from latentrt.plugins import cache_formats
from latentrt.plugins.all_gather.op import all_gather
from latentrt.plugins.mla_attention.op import CONTRACT, mla_attention
from latentrt.plugins.mla_prefill.op import mla_prefill
from latentrt.plugins.moe_experts.op import moe_experts
from latentrt.plugins.moe_route.op import moe_route
from latentrt.plugins.reduce_scatter.op import reduce_scatter
from latentrt.plugins.step_graph import ABSORBED, EXPANDED, FIRST_EXPERT, FORMS, INPUTS

ATTENTION_INPUTS = tuple(spec.name for spec in CONTRACT.inputs if spec.name in INPUTS)
LATENT_NORM_EPS = 1e-6  # q_a_layernorm and kv_a_layernorm ignore rms_norm_eps in the family's own code


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class KvUp(nn.Module):
    """kv_b_proj split per head: w_uk takes q_nope into the latent space, w_uv takes the latent to values."""

    def __init__(self, c: DeepseekV2Config):
        super().__init__()
        self.w_uk = nn.Parameter(torch.empty(c.num_attention_heads, c.qk_nope_head_dim, c.kv_lora_rank))
        self.w_uv = nn.Parameter(torch.empty(c.num_attention_heads, c.kv_lora_rank, c.v_head_dim))


class MlaAttention(nn.Module):
    def __init__(self, c: DeepseekV2Config, cache_format: str, form: str = ABSORBED):
        super().__init__()
        assert form in FORMS, form
        self.config, self.form = c, form
        self.attributes = {"softmax_scale": c.softmax_scale, "cache_format": cache_format}
        heads, bias = c.num_attention_heads, c.attention_bias
        if c.q_lora_rank is None:
            self.q_proj = nn.Linear(c.hidden_size, heads * c.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(c.q_lora_rank, heads * c.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = KvUp(c)
        self.o_proj = nn.Linear(heads * c.v_head_dim, c.hidden_size, bias=bias)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """hidden [T, hidden_size] -> the same, and the cache."""
        c, shared = self.config, [batch[name] for name in ATTENTION_INPUTS]
        q = self.query(hidden).unflatten(-1, (c.num_attention_heads, c.qk_head_dim))  # [T, H, qk_head_dim]
        q_nope, q_pe = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_pe = self.kv_a_proj_with_mqa(hidden).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        attend = self._expanded if self.form == EXPANDED else self._absorbed
        q_pe, latent, k_pe = rotate(q_pe, cos[:, None], sin[:, None]), self.kv_a_layernorm(latent), rotate(k_pe, cos, sin)
        values, cache = attend(q_nope, q_pe, latent, k_pe, cache, *shared)
        return self.o_proj(values.flatten(1)), cache

    def _absorbed(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, cache: Tensor, *batch: Tensor):
        """Values [T, H, v_head_dim] and the cache, by one product on each side of attention over the latent."""
        up = self.kv_b_proj
        q_latent = torch.matmul(q_nope.transpose(0, 1), up.w_uk).transpose(0, 1)  # [T, H, kv_lora_rank]
        attended, cache = mla_attention(q_latent, q_pe, latent, k_pe, cache, *batch, **self.attributes)
        return torch.matmul(attended.transpose(0, 1), up.w_uv).transpose(0, 1), cache

    def _expanded(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, cache: Tensor, *batch: Tensor):
        """The same, with keys and values expanded inside the op."""
        up = self.kv_b_proj
        return mla_prefill(q_nope, q_pe, latent, k_pe, up.w_uk, up.w_uv, cache, *batch, **self.attributes)

    def query(self, hidden: Tensor) -> Tensor:
        if self.config.q_lora_rank is None:
            return self.q_proj(hidden)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved RoPE: pairs (2i, 2i + 1) of x [..., R] turn by the angle of cos, sin [..., R / 2]; in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


class DenseMlp(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Weights of a rank's share of the routed experts, stacked; gate_proj's rows above up_proj's."""

    def __init__(self, c: DeepseekV2Config, ranks: int = 1):
        super().__init__()
        experts = c.n_routed_experts // ranks
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * c.moe_intermediate_size, c.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, c.hidden_size, c.moe_intermediate_size))


class Moe(nn.Module):
    """Routed and shared experts. `route` is the op moe_route, or what stands in for it."""

    def __init__(self, c: DeepseekV2Config, ranks: int = 1):
        super().__init__()
        self.config, self.route, self.ranks = c, moe_route, ranks
        self.gate = nn.Linear(c.hidden_size, c.n_routed_experts, bias=False)
        self.experts = Experts(c, ranks)
        if c.shared_intermediate_size:
            self.shared_experts = DenseMlp(c.hidden_size, c.shared_intermediate_size)

    def forward(self, x: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        c, num_tokens = self.config, batch["num_tokens"]
        topk_ids, topk_weights = self.route(
            F.linear(x.float(), self.gate.weight.float()), num_tokens, None,
            scoring_func=c.scoring_func, topk_method=c.topk_method, group_score="max", n_group=c.n_group or 1,
            topk_group=c.topk_group or 1, top_k=c.num_experts_per_tok, norm_topk_prob=int(c.norm_topk_prob),
            routed_scaling_factor=c.routed_scaling_factor,
        )  # fmt: skip
        y = self.routed(x, topk_ids, topk_weights, batch)
        return y + self.shared_experts(x) if c.shared_intermediate_size else y

    def routed(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """What the chosen experts of all ranks make of x [T, hidden_size], by gathering all rows.

        Sums are of x's type: benchmarks/ranks_numerics.py says what bfloat16 costs there. Here an all-to-all dispatch would go,
        which sends a row only where its experts are: docs/many-gpus.md says when it pays.
        """
        if self.ranks == 1:
            return self._experts(x, topk_ids, topk_weights)
        x, topk_ids, topk_weights = (all_gather(t, num_ranks=self.ranks) for t in (x, topk_ids, topk_weights))
        partial = self._experts(x, topk_ids - batch[FIRST_EXPERT], topk_weights)
        return reduce_scatter(partial, num_ranks=self.ranks)

    def _experts(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return moe_experts(
            x, topk_ids, topk_weights, self.experts.gate_up_proj, self.experts.down_proj, None, None,
            first_expert=0, gate_up_layout="concatenated", total_experts=self.config.n_routed_experts if self.ranks > 1 else 0,
        )  # fmt: skip


class DecoderLayer(nn.Module):
    def __init__(self, c: DeepseekV2Config, is_moe: bool, cache_format: str, form: str = ABSORBED, ranks: int = 1):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = MlaAttention(c, cache_format, form)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = Moe(c, ranks) if is_moe else DenseMlp(c.hidden_size, c.intermediate_size)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden [T, hidden_size], cos and sin [T, qk_rope_head_dim / 2], the cache -> hidden and cache after the layer.

        Behind them what attention and MLP add to the residual, [T, hidden_size] each.
        """
        attended, cache = self.self_attn(self.input_layernorm(hidden), cos, sin, cache, batch)
        hidden = hidden + attended
        added = self.mlp(self.post_attention_layernorm(hidden), batch)
        return hidden + added, cache, attended, added


class Embed(nn.Module):
    """Token embedding, and cos and sin of every row's position: float32, YaRN's attention factor included."""

    def __init__(self, c: DeepseekV2Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.attention_factor = c.rope.attention_factor
        inv_freq = torch.tensor(c.rope.inv_freq(c.qk_rope_head_dim), dtype=torch.float32, device="cpu")
        self.register_buffer("inv_freq", inv_freq)

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [T, hidden_size], cos and sin [T, qk_rope_head_dim / 2]."""
        angles = batch["positions"].float()[:, None] * self.inv_freq[None, :]
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        return self.embed_tokens(batch["input_ids"].long()), cos, sin


class Head(nn.Module):
    """Final norm of the rows that get logits, and the output projection."""

    def __init__(self, c: DeepseekV2Config):
        super().__init__()
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """hidden [T, hidden_size] -> logits [N, vocab_size] float32, last_hidden [N, hidden_size]."""
        last_hidden = self.norm(hidden.index_select(0, batch["logit_rows"].long()))
        return self.lm_head(last_hidden).float(), last_hidden


class DeepseekV2Step(nn.Module):
    """The whole step: what the stamped graph must equal, and the first link of the comparison chain."""

    def __init__(self, c: DeepseekV2Config, cache_format: str = "float32", form: str = ABSORBED):
        super().__init__()
        self.config, self.cache_format = c, cache_format
        self.embed, self.head = Embed(c), Head(c)
        self.layers = nn.ModuleList(
            DecoderLayer(c, c.is_moe_layer(i), cache_format, form) for i in range(c.num_hidden_layers)
        )

    def forward(self, batch: Mapping[str, Tensor], caches: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """`batch` by name, see plugins/step_graph.py -> logits [N, vocab_size], last_hidden [N, hidden_size], new caches."""
        hidden, cos, sin = self.embed(batch)
        updated = []
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden, cache, *_ = layer(hidden, cos, sin, cache, batch)
            updated.append(cache)
        logits, last_hidden = self.head(hidden, batch)
        return logits, last_hidden, updated

    def load_weights(self, read: Read, rotated: bool | None = None) -> "DeepseekV2Step":
        """Fills every parameter; `read` gives a checkpoint tensor by name (Checkpoint.read). Returns self.

        rotated: in the rotated basis of latents; by default where the cache format is for it.
        """
        rotated = cache_formats.get(self.cache_format).rotated if rotated is None else rotated
        parameters = {weight_name(name): parameter for name, parameter in self.named_parameters()}
        for weight in weights(self.config, rotated):
            with torch.no_grad():
                parameters.pop(weight.name).copy_(weight.read(read))
        assert not parameters, f"no weight for {sorted(parameters)}"
        return self
