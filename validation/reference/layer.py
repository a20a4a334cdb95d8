"""One layer of the family, tensor by tensor, as formulas over the checkpoint's tensors of that layer alone.

It is written from the paper, absorbed, so that every tensor has its like inside an engine; tests hold it to transformers and to
`formulas`. A layer takes whole sequences at once: how they were cut into steps changes no number of an exact model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentrt.export.models.deepseek_v2.config import DeepseekV2Config
from latentrt.validation.reference import formulas
from latentrt.validation.reference.arithmetic import Exact


@dataclass(frozen=True)
class Rows:
    """T token rows of whole sequences, one after another."""

    hidden: Tensor  # [T, hidden_size]
    cos: Tensor  # [T, qk_rope_head_dim / 2]
    sin: Tensor
    sequences: tuple[slice, ...]


@dataclass(frozen=True)
class Rules:
    """What can be wrong with attention; as it is here nothing is.

    angles (cos, sin -> both) turns them; softmax_scale None is the config's; `mask_offset` later positions are seen as well.
    """

    interleaved_rope: bool = True
    angles: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    softmax_scale: float | None = None
    mask_offset: int = 0
    softmax_dtype: torch.dtype = torch.float64


@dataclass(frozen=True)
class Choice:
    """Experts of each row, and their weights: [T, top_k] both."""

    ids: Tensor
    weights: Tensor


class Layer:
    """`name` -> tensor [T, ...] of a layer, in the order of the data's way. `inner`: weights in the basis of a rotated cache,
    where latents and what touches them are then given; None where the cache has none."""

    def __init__(self, config: DeepseekV2Config, index: int, math: Exact, inner: Exact | None = None):
        self.c, self.index, self.math, self.inner = config, index, math, inner
        self.prefix = f"model.layers.{index}"

    def run(self, rows: Rows, ids: Tensor | None = None) -> dict[str, Tensor]:
        """All tensors. ids [T, top_k]: experts that are taken instead of the router's own choice."""
        found = self.attention(rows)
        hidden = self.math.keep(rows.hidden + found["attention"])
        return found | self.block(hidden, ids)

    def attention(self, rows: Rows, rules: Rules = Rules()) -> dict[str, Tensor]:
        found = self._attention(self.math, rows, rules)
        if self.inner is None:
            return found
        outer = ("values", "attention")
        return self._attention(self.inner, rows, rules, last="attended") | {name: found[name] for name in outer}

    def _attention(self, m: Exact, rows: Rows, rules: Rules, last: str = "") -> dict[str, Tensor]:
        c, at, found = self.c, f"{self.prefix}.self_attn", {}
        found["input_layernorm"] = x = m.norm(rows.hidden, f"{self.prefix}.input_layernorm", c.rms_norm_eps)
        if c.q_lora_rank is None:
            found["q_proj"] = q = m.linear(x, f"{at}.q_proj")
        else:
            found["q_a_proj"] = q = m.linear(x, f"{at}.q_a_proj")
            found["q_a_layernorm"] = q = m.norm(q, f"{at}.q_a_layernorm", formulas.LATENT_NORM_EPS)
            found["q_b_proj"] = q = m.linear(q, f"{at}.q_b_proj")
        found["kv_a_proj_with_mqa"] = kv = m.linear(x, f"{at}.kv_a_proj_with_mqa")
        latent, k_pe = kv.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        found["latent"] = latent = m.norm(latent, f"{at}.kv_a_layernorm", formulas.LATENT_NORM_EPS)
        q_nope, q_pe = q.unflatten(-1, (c.num_attention_heads, -1)).split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        cos, sin = rules.angles(rows.cos, rows.sin) if rules.angles else (rows.cos, rows.sin)
        found["q_pe"] = q_pe = m.keep(rotate(q_pe, cos[:, None], sin[:, None], rules.interleaved_rope))
        found["k_pe"] = k_pe = m.keep(rotate(k_pe, cos, sin, rules.interleaved_rope))
        found["q_latent"] = q_latent = self.heads(m, q_nope, f"{at}.kv_b_proj.w_uk")
        found["cached latent"], found["cached k_pe"] = cached = m.cached(latent, k_pe)
        found["attended"] = attended = m.keep(self.attend(m, q_latent, q_pe, *cached, rows, rules))
        if last == "attended":
            return found
        found["values"] = values = self.heads(m, attended, f"{at}.kv_b_proj.w_uv").flatten(1)
        found["attention"] = m.linear(values, f"{at}.o_proj")
        return found

    def heads(self, m: Exact, x: Tensor, name: str) -> Tensor:
        """x [T, H, in] times w [H, in, out] -> [T, H, out], head by head."""
        weight = m.weights[name]
        return m.keep(m.product(x.transpose(0, 1), m.weight(name).transpose(1, 2), weight).transpose(0, 1))

    def attend(
        self, m: Exact, q_latent: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, rows: Rows, rules: Rules
    ) -> Tensor:
        """Causal attention within every sequence, over cached latents: [T, H, kv_lora_rank]."""
        scale = self.c.softmax_scale if rules.softmax_scale is None else rules.softmax_scale
        return torch.cat([attend(m, q_latent[s], q_pe[s], latent[s], k_pe[s], scale, rules) for s in rows.sequences])

    def block(self, hidden: Tensor, ids: Tensor | None = None, weights: Tensor | None = None) -> dict[str, Tensor]:
        """From what attention left to the layer's output. ids, weights [T, top_k]: a choice that is taken instead of the
        router's own, except in rows of -1; weights None: what the router's logits say of these experts."""
        m, c, at, found = self.math, self.c, f"{self.prefix}.mlp", {}
        found["post_attention_layernorm"] = x = m.norm(hidden, f"{self.prefix}.post_attention_layernorm", c.rms_norm_eps)
        if c.is_moe_layer(self.index):
            found["router_logits"] = logits = self.router(x)
            own = self.route(logits)
            found["topk_ids"], found["topk_weights"] = own.ids, own.weights
            found["experts"] = added = self.experts(x, own if ids is None else self._given(own, logits, ids, weights))
            if c.shared_intermediate_size:
                found |= self._mlp(x, f"{at}.shared_experts", "shared_experts.")
                added = m.keep(added + found["shared_experts.down_proj"])
        else:
            found |= self._mlp(x, at, "")
            added = found["down_proj"]
        found["mlp"], found["hidden"] = added, m.keep(hidden + added)
        return found

    def router(self, x: Tensor) -> Tensor:
        """Logits [T, E]: float32 in every engine, whatever the weights are stored in."""
        weight = self.math.weights[f"{self.prefix}.mlp.gate.weight"]
        return self.math.product(x, self.math.weight(weight.name), weight)

    def route(self, logits: Tensor) -> Choice:
        ids, weights = formulas.route(logits.numpy(), self.c, formulas.family_routing(self.c))
        return Choice(torch.from_numpy(ids), torch.from_numpy(weights))

    def _given(self, own: Choice, logits: Tensor, ids: Tensor, weights: Tensor | None) -> Choice:
        weights, free = self.weights_of(logits, ids) if weights is None else weights, ids < 0
        return Choice(torch.where(free, own.ids, ids), torch.where(free, own.weights, weights))

    def weights_of(self, logits: Tensor, ids: Tensor, scaling: float | None = None, normalize: bool | None = None) -> Tensor:
        """Weights [T, top_k] of these experts; -1, which stands in padding rows, is taken for the first."""
        c = self.c
        scores = logits.softmax(-1) if c.scoring_func == "softmax" else logits.sigmoid()
        weights = scores.gather(-1, ids.clamp_min(0))
        if c.norm_topk_prob if normalize is None else normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * (c.routed_scaling_factor if scaling is None else scaling)

    def experts(self, x: Tensor, choice: Choice, order: dict[int, int] = {}) -> Tensor:
        """Sum of the chosen experts' outputs. order: expert -> the one whose weights stand in its place."""
        y = torch.zeros_like(x)
        for expert in choice.ids.unique().tolist():
            rows, place = torch.where(choice.ids == expert)
            if expert >= 0:
                y.index_add_(0, rows, self.expert(x[rows], order.get(expert, expert)) * choice.weights[rows, place, None])
        return self.math.keep(y)

    def expert(self, x: Tensor, index: int) -> Tensor:
        """One expert's output, [n, hidden_size]."""
        m, at = self.math, f"{self.prefix}.mlp.experts"
        gate_up, down = m.weights[f"{at}.gate_up_proj"], m.weights[f"{at}.down_proj"]
        gate, up = m.product(x, m.slab(gate_up.name, index), gate_up).chunk(2, -1)
        return m.product(silu(gate) * up, m.slab(down.name, index), down)

    def _mlp(self, x: Tensor, at: str, name: str) -> dict[str, Tensor]:
        m = self.math
        gate, up = m.linear(x, f"{at}.gate_proj"), m.linear(x, f"{at}.up_proj")
        down = m.linear(m.keep(m.keep(silu(gate)) * up), f"{at}.down_proj")
        return {f"{name}gate_proj": gate, f"{name}up_proj": up, f"{name}down_proj": down}


def angles(
    c: DeepseekV2Config, positions: Tensor, kind: torch.dtype = torch.float64, yarn: bool = True, factor: bool = True
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, qk_rope_head_dim / 2] float64 of positions [T]. kind: of the angles; yarn, factor: False without."""
    turned = positions[:, None].to(kind) * torch.from_numpy(formulas.inverse_frequencies(c, yarn)).to(kind)
    gain = formulas.rotation_factor(c) if factor else 1.0
    return turned.double().cos() * gain, turned.double().sin() * gain


def embed(m: Exact, tokens: Tensor, name: str = "model.embed_tokens.weight") -> Tensor:
    """Rows [T, hidden_size] of the embedding, which no format quantizes: it is indexed before it is widened."""
    return m.keep(m.weights[name].read(m.read)[tokens].double())


def head(m: Exact, hidden: Tensor, c: DeepseekV2Config) -> Tensor:
    """Logits [T, vocab_size] of hidden states [T, hidden_size]."""
    return m.linear(m.norm(hidden, "model.norm", c.rms_norm_eps), "lm_head")


def attend(
    m: Exact, q_latent: Tensor, q_pe: Tensor, keys: Tensor, keys_pe: Tensor, scale: float, rules: Rules = Rules(), past: int = 0
) -> Tensor:
    """[T, H, kv_lora_rank] of T rows at positions past, past + 1, ... over keys [S, ...] of positions 0, 1, ..."""
    both, query = torch.cat([keys, keys_pe], -1), torch.cat([q_latent, q_pe], -1)  # [S, rank + rope], [T, H, rank + rope]
    scores = torch.einsum("thd,sd->ths", query, both)
    scores = m.summed(scores, query.norm(dim=-1)[..., None] * both.norm(dim=-1)) * scale
    future = torch.ones(scores.shape[0], scores.shape[-1]).triu(1 + past + rules.mask_offset).bool()
    scores = scores.masked_fill(future[:, None], -1e30)  # a row without any key sees all alike, as in engines
    weights = scores.to(rules.softmax_dtype).softmax(-1).double()
    return m.summed(torch.einsum("ths,sr->thr", weights, keys), weights.norm(dim=-1, keepdim=True) * keys.norm(dim=0))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """x [..., R] turned by angles [..., R / 2]: pairs (2i, 2i + 1), or the wrong (i, i + R / 2), in the order they came."""
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = a * cos - b * sin, a * sin + b * cos
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)
