"""What the family computes, as naive float64 NumPy written from the paper (arXiv 2405.04434, 2309.00071) and from the code
that DeepSeek publishes beside its checkpoints (modeling_deepseek.py). Shared with neither transformers nor `export`.

`AttentionRules` and `RoutingRules` can be made wrong on purpose, one rule at a time: the audit uses this to name a defect.
"""

import math
from dataclasses import dataclass

import numpy as np

from latentrt.export.models.deepseek_v2.config import DeepseekV2Config

LATENT_NORM_EPS = 1e-6  # DeepseekV2RMSNorm's default: modeling_deepseek.py gives the latent norms no eps


@dataclass(frozen=True)
class AttentionRules:
    """True everywhere is the family's rule."""

    mscale_squared: bool = True
    interleaved_rope: bool = True
    yarn_frequencies: bool = True
    attention_factor: bool = True
    own_latent_eps: bool = True


@dataclass(frozen=True)
class RoutingRules:
    """`topk_group` None means no group limit; `normalize` divides the chosen weights by their sum."""

    scoring_func: str
    topk_group: int | None
    normalize: bool
    scaling: float


def yarn_mscale(factor: float, mscale: float) -> float:
    """yarn_get_mscale of modeling_deepseek.py."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x [..., D] / root mean square over D, times weight [D]."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def inverse_frequencies(c: DeepseekV2Config, yarn: bool = True) -> np.ndarray:
    """[qk_rope_head_dim / 2] radians a token. YaRN: high frequencies stay, low ones are divided by the factor."""
    rope, dim = c.rope, c.qk_rope_head_dim
    original = 1.0 / rope.rope_theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope.rope_type == "linear":
        return original / rope.factor
    if rope.rope_type != "yarn" or not yarn:
        return original

    def dimension(rotations: float) -> float:  # the pair that turns this often over the original context
        length = rope.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    low, high = max(first, 0), min(last, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return original / rope.factor * ramp + original * (1 - ramp)


def rotation_factor(c: DeepseekV2Config) -> float:
    """What modeling_deepseek.py multiplies cos and sin by; its defaults are mscale 1 and mscale_all_dim 0."""
    rope = c.rope
    if rope.rope_type != "yarn":
        return 1.0
    if rope.given_attention_factor is not None:  # modeling_deepseek.py knows none
        return rope.given_attention_factor
    mscale = 1.0 if rope.mscale is None else rope.mscale
    return yarn_mscale(rope.factor, mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim or 0.0)


def rotate(x: np.ndarray, angles: np.ndarray, interleaved: bool) -> np.ndarray:
    """x [T, ..., R] turned by angles [T, R / 2]: pairs (2i, 2i + 1), or the wrong (i, i + R / 2)."""
    angles = angles.reshape(angles.shape[0], *[1] * (x.ndim - 2), angles.shape[1])
    cos, sin = np.cos(angles), np.sin(angles)
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def attention(
    hidden: np.ndarray, positions: np.ndarray, weights: dict[str, np.ndarray], c: DeepseekV2Config, rules: AttentionRules
) -> np.ndarray:
    """Multi-head latent attention, keys and values written out. hidden [T, D], positions [T] -> [T, D], float64."""

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    latent_eps = LATENT_NORM_EPS if rules.own_latent_eps else c.rms_norm_eps
    if c.q_lora_rank is None:
        q = linear(hidden, "q_proj")
    else:
        q = linear(rms_norm(linear(hidden, "q_a_proj"), weights["q_a_layernorm.weight"], latent_eps), "q_b_proj")
    q = q.reshape(len(hidden), c.num_attention_heads, c.qk_head_dim)
    compressed = linear(hidden, "kv_a_proj_with_mqa")
    latent = rms_norm(compressed[:, : c.kv_lora_rank], weights["kv_a_layernorm.weight"], latent_eps)
    kv = linear(latent, "kv_b_proj").reshape(len(hidden), c.num_attention_heads, -1)
    k_nope, v = kv[..., : c.qk_nope_head_dim], kv[..., c.qk_nope_head_dim :]
    angles = positions[:, None] * inverse_frequencies(c, rules.yarn_frequencies)
    factor = rotation_factor(c) if rules.attention_factor else 1.0
    q_pe = rotate(q[..., c.qk_nope_head_dim :], angles, rules.interleaved_rope) * factor
    k_pe = rotate(compressed[:, c.kv_lora_rank :], angles, rules.interleaved_rope) * factor
    scores = np.einsum("thd,shd->hts", q[..., : c.qk_nope_head_dim], k_nope) + np.einsum("thd,sd->hts", q_pe, k_pe)
    scores = scores * softmax_scale(c, rules.mscale_squared)
    scores = np.where(positions[None, :, None] >= positions[None, None, :], scores, -np.inf)
    out = np.einsum("hts,shd->thd", softmax(scores), v).reshape(len(hidden), -1)
    return linear(out, "o_proj")


def softmax_scale(c: DeepseekV2Config, mscale_squared: bool = True) -> float:
    """qk_head_dim^-0.5, times mscale(factor, mscale_all_dim)^2 where RoPE is scaled."""
    scale = (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5
    if c.rope.rope_type != "default" and c.rope.mscale_all_dim and mscale_squared:
        scale *= yarn_mscale(c.rope.factor, c.rope.mscale_all_dim) ** 2
    return scale


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis, safe for -inf."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def family_routing(c: DeepseekV2Config) -> RoutingRules:
    """The rules that config.json asks for."""
    limit = c.topk_group if c.topk_method == "group_limited_greedy" else None
    return RoutingRules(c.scoring_func, limit, c.norm_topk_prob, c.routed_scaling_factor)


def route(router_logits: np.ndarray, c: DeepseekV2Config, rules: RoutingRules) -> tuple[np.ndarray, np.ndarray]:
    """router_logits [T, E] float64 -> ids [T, top_k] (best first; ties to the lowest index) and weights [T, top_k]."""
    scores = softmax(router_logits) if rules.scoring_func == "softmax" else 1 / (1 + np.exp(-router_logits))
    if rules.topk_group is not None:
        groups = scores.reshape(len(scores), c.n_group, -1)
        kept = np.argsort(-groups.max(-1), axis=-1, kind="stable")[:, : rules.topk_group]
        mask = np.zeros(groups.shape[:2])
        np.put_along_axis(mask, kept, 1.0, axis=1)
        scores = (groups * mask[..., None]).reshape(scores.shape)
    ids = np.argsort(-scores, axis=-1, kind="stable")[:, : c.num_experts_per_tok]
    weights = np.take_along_axis(scores, ids, -1)
    if rules.normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return ids, weights * rules.scaling


def margins(router_logits: np.ndarray, c: DeepseekV2Config) -> tuple[np.ndarray, np.ndarray]:
    """Smallest gate margin of each token, in scores and in router logits. [T, E] -> [T], [T].

    With a group limit there are two: last group kept against first group dropped, and last expert chosen against first
    not chosen within the kept groups. The smaller one in logits counts.
    """
    logits = router_logits.astype(np.float64)
    scores = softmax(logits) if c.scoring_func == "softmax" else 1 / (1 + np.exp(-logits))
    pairs = []

    def score_of(value: np.ndarray) -> np.ndarray:
        return np.take_along_axis(scores, (logits == value[:, None]).argmax(-1)[:, None], 1)[:, 0]

    if c.topk_method == "group_limited_greedy" and c.topk_group < c.n_group:
        best = logits.reshape(len(logits), c.n_group, -1).max(-1)
        size = c.n_routed_experts // c.n_group
        pairs.append(_edge(best, c.topk_group, score_of))
        kept = best >= np.sort(best, -1)[:, [-c.topk_group]]
        logits = np.where(np.repeat(kept, size, -1), logits, -np.inf)
    if c.num_experts_per_tok < c.n_routed_experts:
        pairs.append(_edge(logits, c.num_experts_per_tok, score_of))
    if not pairs:
        return np.full(len(logits), np.inf), np.full(len(logits), np.inf)
    score, logit = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    smallest = logit.argmin(0)
    rows = np.arange(len(logits))
    return score[smallest, rows], logit[smallest, rows]


def _edge(values: np.ndarray, count: int, score_of) -> tuple[np.ndarray, np.ndarray]:
    """Score and logit difference between the count-th largest value of each row and the next."""
    ordered = -np.sort(-values, -1)
    last, following = ordered[:, count - 1], ordered[:, count]
    finite = np.isfinite(following)
    score = score_of(last) - np.where(finite, score_of(np.where(finite, following, last)), 0.0)
    return score, np.where(finite, last - following, np.inf)


def mlp(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """down(silu(gate x) * up x) for x [T, D]."""
    g = x @ gate.T
    return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T
