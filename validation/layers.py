"""Layer by layer: where does an error first appear? Three runs of one window: free, routing forced, and each layer alone."""

import numpy as np

from validation import routing
from validation.findings import Findings, LayerErrors
from validation.metrics import max_abs_error, relative_error
from validation.reference import Reference, Trace
from validation.stages import Force, Stage
from validation.tolerances import Tolerance

_KEPT_FLIPS = 50  # listed in the evidence, per layer


def trace_stage(stage: Stage, window: np.ndarray, reference: Trace, model: Reference, findings: Findings) -> list[LayerErrors]:
    """Traces `stage` three times against `reference` and records layers, routing and logits."""
    free = stage.trace(window)
    routed = stage.trace(window, Force(reference.routing))
    isolated = stage.trace(window, Force(reference.routing, reference.hidden))
    errors = [
        LayerErrors(
            i, i in reference.routing, relative_error(reference.attention[i], free.attention[i]),
            relative_error(reference.hidden[i], free.hidden[i]), relative_error(reference.hidden[i], routed.hidden[i]),
            relative_error(reference.attention[i], isolated.attention[i]),
            relative_error(reference.hidden[i], isolated.hidden[i]),
        )
        for i in range(len(reference.hidden))
    ]  # fmt: skip
    findings.layers[stage.name] = errors
    findings.traced[stage.name] = {
        f"logits_{name}": float(max_abs_error(reference.logits, trace.logits).max())
        for name, trace in (("free", free), ("routed", routed), ("isolated", isolated))
    }
    compared = [
        routing.compare(i, reference.routing[i], free.routing[i], model.gate(i), model.config) for i in reference.routing
    ]
    findings.routing[stage.name] = [_summary(c) for c in compared]
    findings.series.setdefault("routing", {})[stage.name] = compared
    return errors


def judge_layers(stage: str, errors: list[LayerErrors], limit: Tolerance, findings: Findings, flips: Tolerance) -> None:
    """Checks that every layer alone is within `limit`, and that every routing flip is explained."""
    worst, detail = 0.0, ""
    for e in errors:
        for part, error in (("attention", e.attention_isolated), ("MoE block" if e.is_moe else "MLP", e.hidden_isolated)):
            worst = max(worst, error)
            if not detail and not limit.passes(error):
                detail = f"layer {e.layer} is the first that is off: its {part}, by {error:.2g}"
    findings.judge("each layer alone: largest relative error", stage, worst, limit, detail)
    layers = findings.routing[stage]
    if layers:
        unexplained = sum(entry["unexplained"] for entry in layers)
        first = next((entry["layer"] for entry in layers if entry["unexplained"]), None)
        detail = "" if first is None else f"layer {first} is the first with such a flip: its router is wrong"
        findings.judge("routing flips without a near tie", stage, unexplained, flips, detail)


def _summary(c: routing.LayerRouting) -> dict:
    return {
        "layer": c.layer,
        "agreement": c.agreement,
        "flips": len(c.flips),
        "unexplained": sum(not f.explained for f in c.flips),
        "largest_margin_of_a_flip": max((f.score_margin for f in c.flips), default=0.0),
        "smallest_margin": float(c.score_margins.min()),
        "weight_error": c.weight_error,
        "load": c.load,
        "listed": [vars(f) for f in c.flips[:_KEPT_FLIPS]],
    }
