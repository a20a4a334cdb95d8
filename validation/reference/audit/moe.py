"""Routing, ties and experts against the formulas; a wrong routing is named by the broken rule that reproduces it."""

import numpy as np

from latentrt.export.models.deepseek_v2.config import DeepseekV2Config
from latentrt.validation.reference import formulas
from latentrt.validation.reference.audit.probe import Probe, run_layer
from latentrt.validation.reference.audit.verdict import NOTICEABLE, TOLERANCE, AuditCheck, distance, refuse
from latentrt.validation.reference.formulas import RoutingRules


def check_routing(c: DeepseekV2Config, probe: Probe) -> list[AuditCheck]:
    right = formulas.family_routing(c)
    error = _routing_error(c, probe, right)
    variants = routing_variants(c, right)
    if error > TOLERANCE:
        fits = next((n for n, (rules, _) in variants.items() if _routing_error(c, probe, rules) <= TOLERANCE), None)
        if fits is None:
            refuse(f"routing contract: weights differ from the float64 formula by {error:.2g} (accepted {TOLERANCE:g})", "")
        found = variants[fits][0]
        refuse(f"{fits}: the routing is that of {found}, expected {right} (config.json)", variants[fits][1])
    moved: dict[str, float] = {}
    for name, (rules, _) in variants.items():
        short = name.split(" (")[0]
        moved[short] = max(moved.get(short, 0.0), _routing_error(c, probe, rules))
    return [AuditCheck(n, error, m if m > NOTICEABLE else None) for n, m in moved.items()]


def routing_variants(c: DeepseekV2Config, right: RoutingRules) -> dict[str, tuple[RoutingRules, str]]:
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


def _routing_error(c: DeepseekV2Config, probe: Probe, rules: RoutingRules) -> float:
    """Largest difference of dense weights [T, E] over their RMS, on tokens whose choice is not a near tie."""
    logits = probe.mlp_input @ probe.weights["mlp.gate.weight"].T
    return distance(_dense(*probe.topk, c), _dense(*formulas.route(logits, c, rules), c))


def _dense(ids: np.ndarray, weights: np.ndarray, c: DeepseekV2Config) -> np.ndarray:
    dense = np.zeros((len(ids), c.n_routed_experts))
    np.put_along_axis(dense, ids.astype(np.int64), weights, 1)
    return dense


def check_experts(c: DeepseekV2Config, probe: Probe) -> AuditCheck:
    """The MoE block's output, given the routing that was checked before: experts, weights, shared experts."""
    x, w = probe.mlp_input, probe.weights
    dense = _dense(*probe.topk, c)
    expected = sum(
        dense[:, e : e + 1] * formulas.mlp(x, *(w[f"mlp.experts.{e}.{k}_proj.weight"] for k in ("gate", "up", "down")))
        for e in range(c.n_routed_experts)
    )
    if c.shared_intermediate_size:
        expected = expected + formulas.mlp(x, *(w[f"mlp.shared_experts.{k}_proj.weight"] for k in ("gate", "up", "down")))
    error = distance(probe.mlp_output, expected)
    if error > TOLERANCE:
        refuse(f"MoE block: output differs from the float64 formula by {error:.2g} (accepted {TOLERANCE:g})", "")
    return AuditCheck("experts and shared experts", error, None)


def check_ties(c: DeepseekV2Config, raw: dict) -> AuditCheck:
    """With tied scores any choice among equals is a right one: the sorted weights must be those of the formula."""
    probe = run_layer(c, raw, moe=True, latent_gain=1.0, tied_router=True)
    logits = probe.mlp_input @ probe.weights["mlp.gate.weight"].T
    ids, weights = formulas.route(logits, c, formulas.family_routing(c))
    error = distance(np.sort(probe.topk[1], -1), np.sort(weights, -1))
    if error > TOLERANCE:
        refuse(f"ties: the chosen weights differ from those of any valid choice by {error:.2g}", "")
    same = float((np.sort(probe.topk[0], -1) == np.sort(ids, -1)).all(-1).mean())
    detail = f"the lowest index wins in {same:.0%} of tied tokens; any choice among equals is valid"
    return AuditCheck("ties", error, None, detail)
