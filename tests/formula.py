"""The whole model in float64 NumPy, from config.json and the checkpoint's tensors alone.

Written from modeling_deepseek.py (DeepSeek's own code) and the papers, without absorption, cache or batching, so that it
shares nothing with `export`, `plugins` or transformers. Honours what transformers ignores: moe_layer_freq, scoring_func
and norm_topk_prob. `margin` is the smallest gap between a chosen and a rejected expert or group seen so far: below it a
difference in the last bits may change the choice.
"""

import json
import math
from pathlib import Path

import numpy as np
from safetensors import safe_open


class Formula:
    """One checkpoint; `logits(tokens)` [T, vocab_size] float64."""

    def __init__(self, folder: Path, tensors: dict[str, np.ndarray] | None = None):
        self.config = json.loads((Path(folder) / "config.json").read_text())
        self.tensors = tensors if tensors is not None else read_float64(folder)
        self.margin = math.inf

    def logits(self, tokens: list[int]) -> np.ndarray:
        c = self.config
        x = self.tensors["model.embed_tokens.weight"][tokens]
        for layer in range(c["num_hidden_layers"]):
            p = f"model.layers.{layer}."
            x = x + self.attention(p + "self_attn.", self.norm(x, p + "input_layernorm", c["rms_norm_eps"]))
            normed = self.norm(x, p + "post_attention_layernorm", c["rms_norm_eps"])
            is_moe = layer >= c["first_k_dense_replace"] and layer % c.get("moe_layer_freq", 1) == 0
            x = x + (self.moe(p + "mlp.", normed) if is_moe else self.mlp(p + "mlp.", normed))
        head = "model.embed_tokens" if c.get("tie_word_embeddings") else "lm_head"
        return self.linear(self.norm(x, "model.norm", c["rms_norm_eps"]), head)

    def linear(self, x, name):
        y = x @ self.tensors[f"{name}.weight"].T
        return y + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else y

    def norm(self, x, name, eps=1e-6):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * self.tensors[f"{name}.weight"]

    def mlp(self, prefix, x):
        gate = self.linear(x, prefix + "gate_proj")
        return self.linear(gate / (1 + np.exp(-gate)) * self.linear(x, prefix + "up_proj"), prefix + "down_proj")

    def attention(self, p, x):
        c, n = self.config, len(x)
        heads, nope, rope, v = (c[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        if c["q_lora_rank"] is None:
            q = self.linear(x, p + "q_proj")
        else:
            q = self.linear(self.norm(self.linear(x, p + "q_a_proj"), p + "q_a_layernorm"), p + "q_b_proj")
        q = q.reshape(n, heads, nope + rope)
        compressed = self.linear(x, p + "kv_a_proj_with_mqa")
        kv = self.linear(self.norm(compressed[:, : c["kv_lora_rank"]], p + "kv_a_layernorm"), p + "kv_b_proj")
        kv = kv.reshape(n, heads, nope + v)
        turn = rope_rotation(c, n)
        k_pe, out = turn(compressed[:, c["kv_lora_rank"] :]), np.zeros((n, heads, v))
        for h in range(heads):
            scores = q[:, h, :nope] @ kv[:, h, :nope].T + turn(q[:, h, nope:]) @ k_pe.T
            scores = np.where(np.tri(n, dtype=bool), scores * softmax_scale(c), -np.inf)
            out[:, h] = softmax(scores) @ kv[:, h, nope:]
        return self.linear(out.reshape(n, -1), p + "o_proj")

    def moe(self, p, x):
        c = self.config
        y = self.mlp(p + "shared_experts.", x) if c["n_shared_experts"] else np.zeros_like(x)
        for t, logits in enumerate(x @ self.tensors[p + "gate.weight"].T):
            for expert, weight in self.route(logits):
                y[t] += weight * self.mlp(f"{p}experts.{expert}.", x[t])
        return y

    def route(self, logits) -> list[tuple[int, float]]:
        """The chosen experts of one token and their weights; sorting is stable, so ties go to the lowest index."""
        c, k = self.config, self.config["num_experts_per_tok"]
        scores = softmax(logits) if c.get("scoring_func", "softmax") == "softmax" else 1 / (1 + np.exp(-logits))
        choice = scores.copy()
        if c["topk_method"] == "group_limited_greedy":
            size = len(scores) // c["n_group"]
            best = scores.reshape(-1, size).max(-1)
            order = np.argsort(-best, kind="stable")
            self._note(best[order], c["topk_group"])
            for group in order[c["topk_group"] :]:
                choice[group * size : (group + 1) * size] = 0
        chosen = np.argsort(-choice, kind="stable")[:k]
        self._note(np.sort(choice)[::-1], k)
        weights = choice[chosen]
        if c["norm_topk_prob"]:
            weights = weights / (weights.sum() + 1e-20)
        return list(zip(chosen.tolist(), (weights * c["routed_scaling_factor"]).tolist(), strict=True))

    def _note(self, descending, kept):
        if kept < len(descending) and descending[kept - 1] > 0:
            self.margin = min(self.margin, (descending[kept - 1] - descending[kept]) / descending[kept - 1])


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rope_of(c: dict) -> dict:
    """The RoPE fields whatever their spelling."""
    rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    rope["kind"] = rope.get("rope_type") or rope.get("type") or "default"
    return {"rope_theta": c.get("rope_theta")} | rope


def mscale(factor, m):
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1


def softmax_scale(c: dict) -> float:
    rope, scale = rope_of(c), (c["qk_nope_head_dim"] + c["qk_rope_head_dim"]) ** -0.5
    if rope["kind"] == "yarn" and rope.get("mscale_all_dim"):
        scale *= mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    return scale


def attention_factor(c: dict) -> float:
    """What cos and sin are multiplied by (mscale and mscale_all_dim both given, or neither)."""
    rope = rope_of(c)
    if rope["kind"] != "yarn":
        return 1.0
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["factor"], rope["mscale"]) / mscale(rope["factor"], rope["mscale_all_dim"])
    return mscale(rope["factor"], 1.0)


def inv_freq(c: dict) -> np.ndarray:
    """[qk_rope_head_dim / 2]: pairs that turn more than beta_fast times over the original context keep their frequency,
    those that turn less than beta_slow times are slowed by the factor, a linear ramp lies between (arXiv 2309.00071)."""
    rope, dim = rope_of(c), c["qk_rope_head_dim"]
    theta = float(rope["rope_theta"])
    frequencies = theta ** (-np.arange(0, dim, 2) / dim)
    if rope["kind"] != "yarn":
        return frequencies

    def pair(turns):  # the (fractional) pair index that turns so often over the original context
        wavelength = rope["original_max_position_embeddings"] / turns
        return dim / 2 * math.log(wavelength / (2 * math.pi), theta)

    low = max(math.floor(pair(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair(rope.get("beta_slow") or 1)), dim - 1)
    slowed = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return frequencies * (1 - slowed) + frequencies / rope["factor"] * slowed


def rope_rotation(c: dict, length: int):
    """A function that turns [length, R] rows at positions 0 .. length, pairs (2i, 2i + 1) as complex numbers."""
    turns = attention_factor(c) * np.exp(1j * np.arange(length)[:, None] * inv_freq(c))

    def turn(x):
        z = (x[:, 0::2] + 1j * x[:, 1::2]) * turns
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    return turn


def read_float64(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint's safetensors files, float64."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            tensors |= {name: handle.get_tensor(name).double().numpy() for name in sorted(handle.keys())}
    return tensors
