"""Layer by layer: where does an error first appear? Three runs of one window: free, routing forced, and each layer alone."""

import numpy as np

from latentrt.validation.judge import routing
from latentrt.validation.judge.findings import Findings, LayerErrors
from latentrt.validation.judge.metrics import largest_row_error, max_abs_error, relative_error
from latentrt.validation.judge.tolerances import Tolerance, Tolerances
from latentrt.validation.reference.model import Reference, Trace
from latentrt.validation.stages.base import Force, Stage

_KEPT_FLIPS = 50  # listed in the evidence, per layer


def trace_stage(stage: Stage, window: np.ndarray, reference: Trace, model: Reference, findings: Findings) -> None:
    """Traces `stage` three times against `reference` and records layers, routing and logits."""
    free = stage.trace(window)
    routed = stage.trace(window, Force(reference.routing))
    isolated = stage.trace(window, Force(reference.routing, reference.hidden))
    findings.layers[stage.name] = [
        LayerErrors(
            i, i in reference.routing, relative_error(reference.attention[i], free.attention[i]),
            relative_error(reference.hidden[i], free.hidden[i]), relative_error(reference.hidden[i], routed.hidden[i]),
            relative_error(reference.attention[i], isolated.attention[i]),
            relative_error(reference.hidden[i], isolated.hidden[i]),
            largest_row_error(reference.attention[i], isolated.attention[i]),
            largest_row_error(reference.mlp[i], isolated.mlp[i]),
        )
        for i in range(len(reference.hidden))
    ]  # fmt: skip
    findings.traced[stage.name] = {
        f"logits_{name}": float(max_abs_error(reference.logits, trace.logits).max())
        for name, trace in (("free", free), ("routed", routed), ("isolated", isolated))
    }
    compared = [
        routing.compare(i, reference.routing[i], free.routing[i], model.gate(i), model.config) for i in reference.routing
    ]
    findings.routing[stage.name] = [_summary(c) for c in compared]
    findings.series.setdefault("routing", {})[stage.name] = compared


def judge_layers(stage: str, limit: Tolerance, token: Tolerance | None, t: Tolerances, findings: Findings) -> None:
    """Checks that every layer alone is within `limit` (and its worst token within `token`), that every routing flip is
    explained, and that routing weights are the formula's."""
    errors, layers = findings.layers[stage], findings.routing[stage]
    whole = _parts(errors, "attention_isolated", "hidden_isolated")
    _judge_parts("each layer alone: largest relative error", stage, whole, limit, findings)
    if token is not None:
        worst = _parts(errors, "attention_token", "mlp_token")
        _judge_parts("each layer alone: worst token's relative error", stage, worst, token, findings)
    if layers:
        unexplained = sum(entry["unexplained"] for entry in layers)
        first = next((entry["layer"] for entry in layers if entry["unexplained"]), None)
        detail = "" if first is None else f"layer {first} is the first with such a flip: its router is wrong"
        findings.judge("routing flips without a near tie", stage, unexplained, t.flips, detail)
        off = next((entry["layer"] for entry in layers if not t.routing_weights.passes(entry["formula_error"])), None)
        detail = "" if off is None else f"layer {off} is the first whose routing weights are not the formula's"
        worst = max(entry["formula_error"] for entry in layers)
        findings.judge("routing weights: largest error against the formula", stage, worst, t.routing_weights, detail)


def _parts(errors: list[LayerErrors], attention: str, block: str) -> list[tuple[int, str, float]]:
    """(layer, part, error) in the order of the data's way, from two fields of LayerErrors."""
    return [
        (e.layer, name, getattr(e, field))
        for e in errors
        for name, field in (("attention", attention), ("MoE block" if e.is_moe else "MLP", block))
    ]


def _judge_parts(name: str, stage: str, parts: list[tuple[int, str, float]], limit: Tolerance, findings: Findings) -> None:
    """Judges the largest error of all layers' parts; the detail names the first that is off."""
    off = next((part for part in parts if not limit.passes(part[2])), None)
    detail = "layer {} is the first that is off: its {}, by {:.2g}".format(*off) if off else ""
    findings.judge(name, stage, max(error for _, _, error in parts), limit, detail)


def _summary(c: routing.LayerRouting) -> dict:
    return {
        "layer": c.layer,
        "agreement": c.agreement,
        "flips": len(c.flips),
        "unexplained": sum(not f.explained for f in c.flips),
        "largest_margin_of_a_flip": max((f.score_margin for f in c.flips), default=0.0),
        "smallest_margin": float(c.score_margins.min()),
        "weight_error": c.weight_error,
        "formula_error": c.formula_error,
        "load": c.load,
        "listed": [vars(f) for f in c.flips[:_KEPT_FLIPS]],
    }
