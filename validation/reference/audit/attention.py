"""Attention and its norms against the formula; a wrong one is named by the broken rules that reproduce it."""

from itertools import product

from latentrt.export.models.deepseek_v2.config import DeepseekV2Config
from latentrt.validation.reference import formulas
from latentrt.validation.reference.audit.probe import Probe
from latentrt.validation.reference.audit.verdict import NOTICEABLE, TOLERANCE, AuditCheck, distance, refuse
from latentrt.validation.reference.formulas import AttentionRules

_ATTENTION_CHECKS = {
    "mscale_squared": "YaRN mscale^2 in the softmax scale",
    "interleaved_rope": "interleaved RoPE",
    "yarn_frequencies": "YaRN frequencies",
    "attention_factor": "YaRN attention factor on cos and sin",
    "own_latent_eps": "eps of the latent norms",
}


def check_attention(c: DeepseekV2Config, probes: dict[str, Probe]) -> list[AuditCheck]:
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


def _attention_error(c: DeepseekV2Config, probe: Probe, rules: AttentionRules) -> float:
    weights = {n.removeprefix("self_attn."): w for n, w in probe.weights.items() if n.startswith("self_attn.")}
    return distance(probe.attended, formulas.attention(probe.normed, probe.positions, weights, c, rules))


def _refuse_attention(label: str, errors: dict[AttentionRules, float], right: AttentionRules) -> None:
    fits = next((rules for rules, error in errors.items() if error <= TOLERANCE), None)
    if fits is None:
        refuse(f"attention output ({label}): expected the float64 formula to {TOLERANCE:g}, found {errors[right]:.2g}", "")
    broken = [field for field, kept in vars(fits).items() if not kept]
    names = " and ".join(_ATTENTION_CHECKS[f] for f in broken)
    refuse(
        f"{names}: attention output differs from the float64 formula by {errors[right]:.2g} (accepted {TOLERANCE:g}) and "
        f"equals the formula with this rule broken to {errors[fits]:.1g}",
        broken[0],
    )


def check_norm(c: DeepseekV2Config, probe: Probe) -> AuditCheck:
    expected = formulas.rms_norm(probe.embeds, probe.weights["input_layernorm.weight"], c.rms_norm_eps)
    error = distance(probe.normed, expected)
    if error > TOLERANCE:
        refuse(f"rms_norm_eps: input_layernorm differs from the formula with eps {c.rms_norm_eps:g} by {error:.2g}", "")
    return AuditCheck("rms_norm_eps of the layer norms", error, None)
