"""Routing differences: is a token's other choice of experts a flip on a near tie, or is the router wrong?

Margins are measured in the reference. A flip needs its two candidates to change places, so in router logits the margin
can be at most twice the largest change of a logit of that token; and logits can change no more than the router's weights
make of the change of the router's input (Cauchy-Schwarz); and the choice must be the float64 formula's on the logits that
the router itself had. A flip that fails one of the three is a real error.
"""

from dataclasses import dataclass

import numpy as np

from latentrt.export.models.base import Config
from latentrt.validation.reference import formulas
from latentrt.validation.reference.model import Routing

_ROUNDING = 1e-5  # float32 rounding of a router logit of ordinary size


@dataclass(frozen=True)
class Flip:
    """One token whose set of experts differs."""

    layer: int
    token: int
    reference_ids: list[int]  # sorted
    found_ids: list[int]
    score_margin: float  # reference: score of the last chosen minus that of the first not chosen (expert or group)
    logit_margin: float  # the same in router logits
    logit_change: float  # largest |found - reference| router logit of this token
    explained: bool


@dataclass(frozen=True)
class LayerRouting:
    """One MoE layer: agreement over T tokens, all gate margins, and the flips."""

    layer: int
    agreement: float  # share of tokens with the same set of experts
    score_margins: np.ndarray  # [T] of the reference
    logit_changes: np.ndarray  # [T]
    flipped: np.ndarray  # [T] bool
    weight_error: float  # largest difference of the weights of experts chosen by both
    formula_error: float  # largest difference of the router's weights and the formula's on the router's own logits
    load: np.ndarray  # [E] share of the tokens' choices, reference
    flips: list[Flip]


def compare(layer: int, reference: Routing, found: Routing, gate: np.ndarray | None, config: Config) -> LayerRouting:
    """Compares one MoE layer's routing; gate [E, hidden_size] are the router's weights. None: the router's input is not known,
    and neither its weights, so that logits may change by anything."""
    same = (np.sort(reference.ids, -1) == np.sort(found.ids, -1)).all(-1)
    changes = np.abs(found.router_logits - reference.router_logits).max(-1)  # [T]
    score_margin, logit_margin = formulas.margins(reference.router_logits, config)
    size, possible = np.abs(reference.router_logits).max(-1) + 1.0, np.inf
    if gate is not None:
        moved = np.linalg.norm(found.router_input.astype(np.float64) - reference.router_input, axis=-1)
        possible = moved * np.linalg.norm(gate.astype(np.float64), axis=-1).max() + _ROUNDING * size
    explained = (logit_margin <= 2 * changes + _ROUNDING * size) & (changes <= possible) & _follows(found, size, config)
    flips = [
        Flip(layer, int(t), sorted(map(int, reference.ids[t])), sorted(map(int, found.ids[t])), float(score_margin[t]),
             float(logit_margin[t]), float(changes[t]), bool(explained[t]))
        for t in np.flatnonzero(~same)
    ]  # fmt: skip
    load = np.bincount(reference.ids.ravel(), minlength=reference.router_logits.shape[-1]) / reference.ids.size
    weight_errors = 0.0, 0.0
    if found.weights is not None:
        weight_errors = _weight_error(reference, found), _weight_error(_formula(found, config), found)
    return LayerRouting(layer, float(same.mean()), score_margin, changes, ~same, *weight_errors, load, flips)


def _formula(found: Routing, config: Config) -> Routing:
    """What the formula makes of the logits that the router itself had."""
    ids, weights = formulas.route(found.router_logits.astype(np.float64), config, formulas.family_routing(config))
    return Routing(found.router_input, found.router_logits, ids, weights)


def _follows(found: Routing, size: np.ndarray, config: Config) -> np.ndarray:
    """[T] bool: the chosen experts are those of the formula on the router's own logits, or those are a tie."""
    ids = _formula(found, config).ids
    _, margin = formulas.margins(found.router_logits, config)
    return (np.sort(ids, -1) == np.sort(found.ids, -1)).all(-1) | (margin <= _ROUNDING * size)


def _weight_error(reference: Routing, found: Routing) -> float:
    """Largest difference of weights over tokens and experts that both chose."""
    match = reference.ids[:, :, None] == found.ids[:, None, :]
    difference = np.abs(reference.weights[:, :, None].astype(np.float64) - found.weights[:, None, :])
    return float(difference[match].max(initial=0.0))
