"""The audit of the reference: does this transformers build compute what the checkpoint's config.json says?

transformers' own classes are built small (a few heads, narrow layers) with everything that decides a rule kept: RoPE
parameters, qk head dimensions, experts, groups, top-k, scaling. Their outputs are compared with `formulas`. Where they
differ, the formulas are made wrong one rule at a time until they agree, so that the error names the defect.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import transformers

from export.config import DeepseekV2Config
from validation import formulas
from validation.errors import ReferenceRefused
from validation.formulas import AttentionRules, RoutingRules
from validation.reference_weights import parameter_view

TOLERANCE = 2e-4  # largest difference over the RMS of the output: float32 rounding reaches 2e-6, a wrong rule 1e-2 and more
NOTICEABLE = 1e-3  # a rule that moves the output by less does not matter for this config
TOKENS, FIRST_POSITION = 128, 200
_SMALL = {
    "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 32, "v_head_dim": 16,
    "intermediate_size": 32, "moe_intermediate_size": 16, "vocab_size": 32, "num_hidden_layers": 1,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_ATTENTION_CHECKS = {
    "mscale_squared": "YaRN mscale^2 in the softmax scale",
    "interleaved_rope": "interleaved RoPE",
    "yarn_frequencies": "YaRN frequencies",
    "attention_factor": "YaRN attention factor on cos and sin",
    "own_latent_eps": "eps of the latent norms",
}
_ADVICE = {
    "mscale_squared": "transformers has it since pull request 47435: install transformers 5.23.0 or newer",
    "norm_topk_prob": "transformers ignores norm_topk_prob (5.23.0): no release computes this config",
    "scoring_func": "transformers knows softmax only (5.23.0): no release computes this config",
    "moe_layer_freq": "transformers ignores moe_layer_freq (5.23.0): no release computes this config",
}  # fmt: skip
_DEFAULT_ADVICE = "install transformers 5.23.0, which passes this audit"


@dataclass(frozen=True)
class AuditCheck:
    """One rule: `error` of the reference against the formula, and how far the output would be off with the rule broken."""

    name: str
    error: float
    if_broken: float | None  # None: the config leaves nothing to break
    detail: str = ""


@dataclass
class _Probe:
    """What went into and came out of one small decoder layer of transformers."""

    positions: np.ndarray  # [T]
    embeds: np.ndarray  # [T, D]
    normed: np.ndarray  # [T, D] input of self_attn
    attended: np.ndarray  # [T, D] output of self_attn
    mlp_input: np.ndarray  # [T, D]
    mlp_output: np.ndarray  # [T, D]
    topk: tuple[np.ndarray, np.ndarray] | None  # ids and weights [T, top_k]
    weights: dict[str, np.ndarray]  # of the layer, by checkpoint name without "model.layers.0."


def audit(config: DeepseekV2Config, raw: dict) -> list[AuditCheck]:
    """Audits transformers for a checkpoint with config.json `raw`, parsed as `config`. Raises ReferenceRefused."""
    structure(config, raw)
    has_moe = any(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    small = _small_config(config)
    ordinary = _probe(small, raw, moe=has_moe, latent_gain=1.0)
    faint = _probe(small, raw, moe=has_moe, latent_gain=1e-3)
    checks = _audit_attention(small, {"ordinary": ordinary, "faint latents": faint})
    checks.append(_audit_norm(small, ordinary))
    if has_moe:
        checks += _audit_routing(small, ordinary)
        checks.append(_audit_experts(small, ordinary))
        checks.append(_audit_ties(small, raw))
    return checks


def structure(config: DeepseekV2Config, raw: dict) -> None:
    """Are the MoE layers of transformers' model those of the config (first_k_dense_replace, moe_layer_freq)?"""
    with torch.device("meta"):
        model = build(raw, dict(_SMALL, num_hidden_layers=config.num_hidden_layers))
    found = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    expected = [config.is_moe_layer(i) for i in range(config.num_hidden_layers)]
    if found != expected:
        wrong = next(i for i, (f, e) in enumerate(zip(found, expected, strict=True)) if f != e)
        field = "moe_layer_freq" if config.moe_layer_freq != 1 else "first_k_dense_replace"
        kind = {True: "MoE", False: "dense"}
        _refuse(f"{field}: layer {wrong} is {kind[found[wrong]]}, expected {kind[expected[wrong]]}", field)


def build(raw: dict, overrides: dict) -> torch.nn.Module:
    """transformers' DeepseekV2ForCausalLM for config.json `raw` with some fields replaced; random weights."""
    raw = {**raw, **overrides}
    if raw.get("n_shared_experts") is None:
        raw["n_shared_experts"] = 0  # the same model; transformers does not take null
    try:
        hf = transformers.DeepseekV2Config.from_dict({k: v for k, v in raw.items() if k != "auto_map"})
        hf._attn_implementation = "eager"
        hf._experts_implementation = "eager"  # the others want sizes that are multiples of 16 bytes
        return transformers.DeepseekV2ForCausalLM(hf).eval()
    except Exception as error:  # whatever transformers raises: strict config errors, missing features, bugs
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ReferenceRefused(f"transformers {transformers.__version__} cannot build this model: {first}") from error


def _small_config(config: DeepseekV2Config) -> DeepseekV2Config:
    known = {k: v for k, v in _SMALL.items() if k in type(config).model_fields}
    return config.model_copy(update=known | {"q_lora_rank": 32 if config.q_lora_rank else None})


def _probe(config: DeepseekV2Config, raw: dict, moe: bool, latent_gain: float, tied_router: bool = False) -> _Probe:
    """Runs one decoder layer on random weights, away from position 0, but not so far that float32 angles round visibly."""
    small = _SMALL | {"q_lora_rank": config.q_lora_rank, "first_k_dense_replace": 0 if moe else 1, "moe_layer_freq": 1}
    model = build(raw, small)
    weights = _randomize(model, config, moe, latent_gain, tied_router)
    captured, layer = {}, model.model.layers[0]
    layer.self_attn.register_forward_hook(
        lambda m, args, kwargs, out: captured.update(normed=kwargs.get("hidden_states", *args[:1]), attended=out[0]),
        with_kwargs=True,
    )
    layer.mlp.register_forward_hook(lambda m, args, out: captured.update(mlp_input=args[0], mlp_output=out))
    if moe:
        layer.mlp.gate.register_forward_hook(lambda m, args, out: captured.update(gate=out))
    positions = torch.arange(FIRST_POSITION, FIRST_POSITION + TOKENS)
    embeds = torch.randn(TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(1)) * 1e-2
    with torch.no_grad():
        model.model(
            inputs_embeds=embeds[None], position_ids=positions[None], attention_mask=torch.ones(1, TOKENS), use_cache=False
        )
    arrays = {k: _flat(v) for k, v in captured.items() if k != "gate"}
    topk = topk_of(captured["gate"], config.num_experts_per_tok) if moe else None
    return _Probe(positions.numpy().astype(np.float64), _flat(embeds), topk=topk, weights=weights, **arrays)


def _randomize(model, config: DeepseekV2Config, moe: bool, latent_gain: float, tied_router: bool) -> dict[str, np.ndarray]:
    """Weights that keep every activation near 1 and scores spread; returns the layer's, in float64."""
    generator = torch.Generator().manual_seed(0)
    gains = {"q_proj": 3.0, "q_b_proj": 3.0, "gate.weight": 2.0, "kv_a_proj": latent_gain}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in parameters.items():
            values = torch.randn(p.shape, generator=generator)
            gain = next((g for part, g in gains.items() if part in name), 1.0)
            fan_in = max(p.shape[-1], 1) if p.dim() > 1 else 10
            p.copy_(1 + 0.3 * values if "norm" in name else values * gain * fan_in**-0.5)
        if tied_router:
            gate = parameters["model.layers.0.mlp.gate.weight"]
            gate.copy_(gate[: max(1, len(gate) // 4)].repeat(5, 1)[: len(gate)])
    names = [n for n in parameters if n.startswith("model.layers.0.") and ".mlp.experts." not in n]
    if moe:
        experts = [f"model.layers.0.mlp.experts.{e}.{k}_proj.weight" for e in range(config.n_routed_experts)
                   for k in ("gate", "up", "down")]  # fmt: skip
        names += experts
    return {n.removeprefix("model.layers.0."): parameter_view(parameters, n).double().numpy() for n in names}


def topk_of(gate_output, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and weights [T, top_k] in what transformers' gate returns (the order differs between versions)."""
    parts = [t.detach() for t in gate_output if isinstance(t, torch.Tensor)]
    ids = next((t for t in parts if not t.is_floating_point() and t.shape[-1] == top_k), None)
    weights = next((t for t in reversed(parts) if t.is_floating_point() and ids is not None and t.shape == ids.shape), None)
    if ids is None or weights is None:
        raise ReferenceRefused(
            f"transformers {transformers.__version__}: the gate returns {[list(p.shape) for p in parts]}, expected ids and "
            f"weights [T, {top_k}]; {_DEFAULT_ADVICE}"
        )
    return ids.reshape(-1, top_k).numpy(), weights.reshape(-1, top_k).double().numpy()


def _audit_attention(c: DeepseekV2Config, probes: dict[str, _Probe]) -> list[AuditCheck]:
    right = AttentionRules()
    for label, probe in probes.items():
        errors = {rules: _attention_error(c, probe, rules) for rules in _broken_rules()}
        if errors[right] > TOLERANCE:
            _refuse_attention(label, errors, right)
    checks = []
    for field, name in _ATTENTION_CHECKS.items():
        broken = AttentionRules(**{field: False})
        found = max(_attention_error(c, p, right) for p in probes.values())
        moved = max(_attention_error(c, p, broken) for p in probes.values())
        checks.append(AuditCheck(name, found, moved if moved > NOTICEABLE else None))
    return checks


def _broken_rules() -> list[AttentionRules]:
    """All combinations, those with the fewest broken rules first."""
    return sorted(
        (AttentionRules(*flags) for flags in product((True, False), repeat=len(_ATTENTION_CHECKS))),
        key=lambda rules: sum(not v for v in vars(rules).values()),
    )


def _attention_error(c: DeepseekV2Config, probe: _Probe, rules: AttentionRules) -> float:
    weights = {n.removeprefix("self_attn."): w for n, w in probe.weights.items() if n.startswith("self_attn.")}
    return _distance(probe.attended, formulas.attention(probe.normed, probe.positions, weights, c, rules))


def _refuse_attention(label: str, errors: dict[AttentionRules, float], right: AttentionRules) -> None:
    fits = next((rules for rules, error in errors.items() if error <= TOLERANCE), None)
    if fits is None:
        _refuse(f"attention output ({label}): expected the float64 formula to {TOLERANCE:g}, found {errors[right]:.2g}", "")
    broken = [field for field, kept in vars(fits).items() if not kept]
    names = " and ".join(_ATTENTION_CHECKS[f] for f in broken)
    _refuse(
        f"{names}: attention output differs from the float64 formula by {errors[right]:.2g} (accepted {TOLERANCE:g}) and "
        f"equals the formula with this rule broken to {errors[fits]:.1g}",
        broken[0],
    )


def _audit_norm(c: DeepseekV2Config, probe: _Probe) -> AuditCheck:
    expected = formulas.rms_norm(probe.embeds, probe.weights["input_layernorm.weight"], c.rms_norm_eps)
    error = _distance(probe.normed, expected)
    if error > TOLERANCE:
        _refuse(f"rms_norm_eps: input_layernorm differs from the formula with eps {c.rms_norm_eps:g} by {error:.2g}", "")
    return AuditCheck("rms_norm_eps of the layer norms", error, None)


def _audit_routing(c: DeepseekV2Config, probe: _Probe) -> list[AuditCheck]:
    right = formulas.family_routing(c)
    error = _routing_error(c, probe, right)
    variants = _routing_variants(c, right)
    if error > TOLERANCE:
        fits = next((n for n, (rules, _) in variants.items() if _routing_error(c, probe, rules) <= TOLERANCE), None)
        if fits is None:
            _refuse(f"routing contract: weights differ from the float64 formula by {error:.2g} (accepted {TOLERANCE:g})", "")
        found = variants[fits][0]
        _refuse(f"{fits}: the routing is that of {found}, expected {right} (config.json)", variants[fits][1])
    moved: dict[str, float] = {}
    for name, (rules, _) in variants.items():
        short = name.split(" (")[0]
        moved[short] = max(moved.get(short, 0.0), _routing_error(c, probe, rules))
    return [AuditCheck(n, error, m if m > NOTICEABLE else None) for n, m in moved.items()]


def _routing_variants(c: DeepseekV2Config, right: RoutingRules) -> dict[str, tuple[RoutingRules, str]]:
    """Wrong rules by the name of the check that they break, and the field that advice goes by."""
    def changed(**fields) -> RoutingRules:
        return RoutingRules(**{**vars(right), **fields})

    other = "sigmoid" if right.scoring_func == "softmax" else "softmax"
    variants = {
        "routed_scaling_factor (dropped)": (changed(scaling=1.0), ""),
        "norm_topk_prob": (changed(normalize=not right.normalize), "norm_topk_prob"),
        "scoring_func": (changed(scoring_func=other), "scoring_func"),
    }
    if right.topk_group is not None:
        variants["group limit (ignored)"] = (changed(topk_group=None), "")
        for count in range(1, c.n_group + 1):
            if count != right.topk_group:
                variants[f"group limit ({count} groups)"] = (changed(topk_group=count), "")
        variants["group limit (ignored), scaling dropped"] = (changed(topk_group=None, scaling=1.0), "")
    return {n: v for n, v in variants.items() if v[0] != right}


def _routing_error(c: DeepseekV2Config, probe: _Probe, rules: RoutingRules) -> float:
    """Largest difference of dense weights [T, E] over their RMS, on tokens whose choice is not a near tie."""
    logits = probe.mlp_input @ probe.weights["mlp.gate.weight"].T
    return _distance(_dense(*probe.topk, c), _dense(*formulas.route(logits, c, rules), c))


def _dense(ids: np.ndarray, weights: np.ndarray, c: DeepseekV2Config) -> np.ndarray:
    dense = np.zeros((len(ids), c.n_routed_experts))
    np.put_along_axis(dense, ids.astype(np.int64), weights, 1)
    return dense


def _audit_experts(c: DeepseekV2Config, probe: _Probe) -> AuditCheck:
    """The MoE block's output, given the routing that was checked before: experts, weights, shared experts."""
    x, w = probe.mlp_input, probe.weights
    dense = _dense(*probe.topk, c)
    expected = sum(
        dense[:, e : e + 1] * formulas.mlp(x, *(w[f"mlp.experts.{e}.{k}_proj.weight"] for k in ("gate", "up", "down")))
        for e in range(c.n_routed_experts)
    )
    if c.shared_intermediate_size:
        expected = expected + formulas.mlp(x, *(w[f"mlp.shared_experts.{k}_proj.weight"] for k in ("gate", "up", "down")))
    error = _distance(probe.mlp_output, expected)
    if error > TOLERANCE:
        _refuse(f"MoE block: output differs from the float64 formula by {error:.2g} (accepted {TOLERANCE:g})", "")
    return AuditCheck("experts and shared experts", error, None)


def _audit_ties(c: DeepseekV2Config, raw: dict) -> AuditCheck:
    """With tied scores any choice among equals is a right one: the sorted weights must be those of the formula."""
    probe = _probe(c, raw, moe=True, latent_gain=1.0, tied_router=True)
    logits = probe.mlp_input @ probe.weights["mlp.gate.weight"].T
    ids, weights = formulas.route(logits, c, formulas.family_routing(c))
    error = _distance(np.sort(probe.topk[1], -1), np.sort(weights, -1))
    if error > TOLERANCE:
        _refuse(f"ties: the chosen weights differ from those of any valid choice by {error:.2g}", "")
    same = float((np.sort(probe.topk[0], -1) == np.sort(ids, -1)).all(-1).mean())
    detail = f"the lowest index wins in {same:.0%} of tied tokens; any choice among equals is valid"
    return AuditCheck("ties", error, None, detail)


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the RMS of what is expected; infinite if something is not finite."""
    error = np.abs(found - expected).max() / (np.sqrt((expected**2).mean()) + 1e-30)
    return float(error) if np.isfinite(error) else float("inf")


def _flat(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().reshape(-1, tensor.shape[-1]).numpy()


def _refuse(finding: str, field: str) -> None:
    raise ReferenceRefused(
        f"transformers {transformers.__version__} fails the reference audit: {finding}; {_ADVICE.get(field, _DEFAULT_ADVICE)}"
    )
