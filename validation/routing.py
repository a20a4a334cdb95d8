"""Routing differences: is a token's other choice of experts a flip on a near tie, or is the router wrong?

Margins are measured in the reference. A flip needs its two candidates to change places, so in router logits the margin
can be at most twice the largest change of a logit of that token; and logits can change no more than the router's weights
make of the change of the router's input (Cauchy-Schwarz); and the choice must be the float64 formula's on the logits that
the router itself had. A flip that fails one of the three is a real error.
"""

from dataclasses import dataclass

import numpy as np

from export.config import DeepseekV2Config
from validation import formulas
from validation.reference import Routing

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


def compare(layer: int, reference: Routing, found: Routing, gate: np.ndarray, config: DeepseekV2Config) -> LayerRouting:
    """Compares one MoE layer's routing; gate [E, hidden_size] are the router's weights."""
    same = (np.sort(reference.ids, -1) == np.sort(found.ids, -1)).all(-1)
    changes = np.abs(found.router_logits - reference.router_logits).max(-1)  # [T]
    score_margin, logit_margin = margins(reference.router_logits, config)
    moved = np.linalg.norm(found.router_input.astype(np.float64) - reference.router_input, axis=-1)
    size = np.abs(reference.router_logits).max(-1) + 1.0
    possible = moved * np.linalg.norm(gate.astype(np.float64), axis=-1).max() + _ROUNDING * size
    explained = (logit_margin <= 2 * changes + _ROUNDING * size) & (changes <= possible) & _follows(found, size, config)
    flips = [
        Flip(layer, int(t), sorted(map(int, reference.ids[t])), sorted(map(int, found.ids[t])), float(score_margin[t]),
             float(logit_margin[t]), float(changes[t]), bool(explained[t]))
        for t in np.flatnonzero(~same)
    ]  # fmt: skip
    load = np.bincount(reference.ids.ravel(), minlength=config.n_routed_experts) / reference.ids.size
    weight_errors = _weight_error(reference, found), _weight_error(_formula(found, config), found)
    return LayerRouting(layer, float(same.mean()), score_margin, changes, ~same, *weight_errors, load, flips)


def _formula(found: Routing, config: DeepseekV2Config) -> Routing:
    """What the formula makes of the logits that the router itself had."""
    ids, weights = formulas.route(found.router_logits.astype(np.float64), config, formulas.family_routing(config))
    return Routing(found.router_input, found.router_logits, ids, weights)


def _follows(found: Routing, size: np.ndarray, config: DeepseekV2Config) -> np.ndarray:
    """[T] bool: the chosen experts are those of the formula on the router's own logits, or those are a tie."""
    ids = _formula(found, config).ids
    _, margin = margins(found.router_logits, config)
    return (np.sort(ids, -1) == np.sort(found.ids, -1)).all(-1) | (margin <= _ROUNDING * size)


def margins(router_logits: np.ndarray, config: DeepseekV2Config) -> tuple[np.ndarray, np.ndarray]:
    """Smallest gate margin of each token, in scores and in router logits. [T, E] -> [T], [T].

    With a group limit there are two: last group kept against first group dropped, and last expert chosen against first
    not chosen within the kept groups. The smaller one in logits counts.
    """
    logits = router_logits.astype(np.float64)
    scores = formulas.softmax(logits) if config.scoring_func == "softmax" else 1 / (1 + np.exp(-logits))
    pairs = []

    def score_of(value: np.ndarray) -> np.ndarray:
        return np.take_along_axis(scores, (logits == value[:, None]).argmax(-1)[:, None], 1)[:, 0]

    if config.topk_method == "group_limited_greedy" and config.topk_group < config.n_group:
        best = logits.reshape(len(logits), config.n_group, -1).max(-1)
        size = config.n_routed_experts // config.n_group
        pairs.append(_edge(best, config.topk_group, score_of))
        kept = best >= np.sort(best, -1)[:, [-config.topk_group]]
        logits = np.where(np.repeat(kept, size, -1), logits, -np.inf)
    if config.num_experts_per_tok < config.n_routed_experts:
        pairs.append(_edge(logits, config.num_experts_per_tok, score_of))
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


def _weight_error(reference: Routing, found: Routing) -> float:
    """Largest difference of weights over tokens and experts that both chose."""
    match = reference.ids[:, :, None] == found.ids[:, None, :]
    difference = np.abs(reference.weights[:, :, None].astype(np.float64) - found.weights[:, None, :])
    return float(difference[match].max(initial=0.0))
