"""Layer by layer: where does an error first appear? Three runs of one window: free, routing forced, and each layer alone."""

import numpy as np

from latentrt.validation.bisect.spread import DOUBT, MISTAKES
from latentrt.validation.calibration.expected import LayerSpread
from latentrt.validation.judge import routing
from latentrt.validation.judge.findings import Findings, LayerErrors
from latentrt.validation.judge.metrics import largest_row_error, max_abs_error, relative_error
from latentrt.validation.judge.tolerances import FLIPS, ROUTING_WEIGHTS, Tolerance
from latentrt.validation.reference.model import Reference, Trace
from latentrt.validation.stages.base import Force, Stage

_KEPT_FLIPS = 50  # listed in the evidence, per layer
AXES = (
    ("largest relative error", "whole"), ("worst token's relative error", "row"), ("worst channel's relative error", "column"),
)  # fmt: skip
LAYER_REASON = (
    f"{DOUBT:g} times what the target's own roundings, emulated, make of the same input; of many tokens or channels the "
    f"largest but for once in {1 / MISTAKES:.0g}"
)


def trace_stage(stage: Stage, window: np.ndarray, reference: Trace, model: Reference, findings: Findings) -> Trace:
    """Traces `stage` three times against `reference` and records layers, routing and logits; returns the last trace."""
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
    return isolated


def judge_layers(stage: str, spreads: list[LayerSpread], findings: Findings) -> None:
    """Checks that every layer alone is off by no more than its roundings, as a whole, in its worst token and channel."""
    findings.alone[stage] = [vars(s) for s in spreads]
    for name, axis in AXES:
        ratios = [_ratio(s, axis) for s in spreads]
        worst = spreads[int(np.argmax(ratios))]
        found, expected, limit = (getattr(e, axis) for e in (worst.spread.found, worst.spread.expected, worst.spread.limit))
        off = next((s for s, ratio in zip(spreads, ratios, strict=True) if not ratio <= 1), None)
        detail = f"layer {off.layer} is the first that is off: its {_part(off, findings, stage)}" if off else ""
        detail += f", by {getattr(off.spread.found, axis):.2g}" if off else ""
        findings.judge(f"each layer alone: {name}", stage, found, Tolerance(limit, LAYER_REASON, expected=expected), detail)


def judge_routing(stage: str, findings: Findings) -> None:
    """Checks that every routing flip is explained, and that routing weights are the formula's."""
    layers = findings.routing[stage]
    if not layers:
        return
    unexplained = sum(entry["unexplained"] for entry in layers)
    first = next((entry["layer"] for entry in layers if entry["unexplained"]), None)
    detail = "" if first is None else f"layer {first} is the first with such a flip: its router is wrong"
    findings.judge("routing flips without a near tie", stage, unexplained, FLIPS, detail)
    off = next((entry["layer"] for entry in layers if not ROUTING_WEIGHTS.passes(entry["formula_error"])), None)
    detail = "" if off is None else f"layer {off} is the first whose routing weights are not the formula's"
    worst = max(entry["formula_error"] for entry in layers)
    findings.judge("routing weights: largest error against the formula", stage, worst, ROUTING_WEIGHTS, detail)


def _ratio(s: LayerSpread, axis: str) -> float:
    found, limit = getattr(s.spread.found, axis), getattr(s.spread.limit, axis)
    ratio = found / limit if limit else (0.0 if found == 0 else np.inf)
    return ratio if ratio == ratio else np.inf


def _part(s: LayerSpread, findings: Findings, stage: str) -> str:
    is_moe = any(e.is_moe for e in findings.layers[stage] if e.layer == s.layer)
    return {"mlp": "MoE block" if is_moe else "MLP", "hidden": "output"}.get(s.tensor, s.tensor)


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
