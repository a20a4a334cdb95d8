"""Hypotheses of routing: which broken rule makes of the engine's own router logits what the engine chose."""

from collections.abc import Iterator

import numpy as np
import torch

from latentrt.validation.bisect.case import LayerCase
from latentrt.validation.bisect.hypotheses import Hypothesis
from latentrt.validation.bisect.of_values import Predictions
from latentrt.validation.judge import routing
from latentrt.validation.judge.routing import LayerRouting
from latentrt.validation.reference import formulas
from latentrt.validation.reference.audit.moe import routing_variants
from latentrt.validation.reference.model import Routing


def compared(case: LayerCase) -> LayerRouting:
    """The engine's choices against the formulas', with gate margins; see judge/routing.py."""
    exact, found = case.exact, case.found
    gate = case.layer.math.weight(f"{case.part.name}.mlp.gate.weight").numpy()
    sides = [Routing(*(s[name].numpy() for name in _FIELDS)) for s in (exact, found)]
    return routing.compare(case.index, *sides, gate, case.s.config)


_FIELDS = ("post_attention_layernorm", "router_logits", "topk_ids", "topk_weights")


def rules(case: LayerCase) -> list[Hypothesis]:
    """Broken rules by how many tokens' experts they get wrong, over those that the right ones get wrong."""
    c, ids = case.s.config, case.found["topk_ids"].numpy()
    logits = case.found["router_logits"].numpy()
    right = formulas.family_routing(c)
    wrong = max(1, _differ(ids, logits, c, right))
    found = [
        Hypothesis(name, f"the engine's choice is that of {changed}, config.json asks for {right}",
                   _differ(ids, logits, c, changed) / wrong)
        for name, (changed, _) in routing_variants(c, right).items()
    ]  # fmt: skip
    return sorted([*found, *_orders(case, wrong)], key=lambda h: h.left)


def weight_rules(case: LayerCase, tap: str) -> Predictions:
    """The weights of the chosen experts under other rules, on the engine's own logits."""
    c, logits = case.s.config, case.found["router_logits"]
    normalized = case.layer.weights_of(logits, case.ids, normalize=not c.norm_topk_prob)
    yield "norm_topk_prob", f"weights are {'not ' if c.norm_topk_prob else ''}divided by their sum", normalized
    other = logits.sigmoid() if c.scoring_func == "softmax" else logits.softmax(-1)
    yield "scoring_func", f"not {c.scoring_func}", other.gather(-1, case.ids) * c.routed_scaling_factor


def _differ(ids: np.ndarray, logits: np.ndarray, c, changed: formulas.RoutingRules) -> int:
    """Tokens whose set of experts is another under these rules."""
    theirs, _ = formulas.route(logits, c, changed)
    return int((np.sort(theirs, -1) != np.sort(ids, -1)).any(-1).sum())


def _orders(case: LayerCase, wrong: int) -> Iterator[Hypothesis]:
    """Ids of experts that are all others: each expert of the formula has become one other."""
    c, found = case.s.config, case.found["topk_ids"]
    theirs = torch.from_numpy(formulas.route(case.found["router_logits"].numpy(), c, formulas.family_routing(c))[0])
    pairs = torch.zeros(c.n_routed_experts, c.n_routed_experts)
    pairs.index_put_((theirs.flatten(), found.clamp_min(0).long().flatten()), torch.ones(found.numel()), accumulate=True)
    order = pairs.argmax(1)
    moved = [f"{e} became {int(o)}" for e, o in enumerate(order) if int(o) != e and pairs[e].sum()]
    if moved and len(order.unique()) == len(order):
        left = int((order[theirs].sort(-1).values != found.long().sort(-1).values).any(-1).sum()) / wrong
        yield Hypothesis("experts permuted (permutation)", f"ids of experts: {', '.join(moved[:4])}", left)
