"""Near ties and real errors of the routing, on hand-made logits."""

import dataclasses

import numpy as np

from latentrt.export.models.deepseek_v2 import config as config_file
from latentrt.validation.judge import routing
from latentrt.validation.reference import formulas
from latentrt.validation.reference.model import Routing
from tests import checkpoints

CONFIG = config_file.parse(checkpoints.CONFIG | {"model_type": "deepseek_v2", "num_experts_per_tok": 2})
GREEDY = CONFIG.model_copy(update={"topk_method": "greedy"})
GATE = np.eye(8)  # router logits are the router's input: Cauchy-Schwarz is exact


def routed(logits: np.ndarray, config=GREEDY) -> Routing:
    ids, weights = formulas.route(logits.astype(np.float64), config, formulas.family_routing(config))
    return Routing(logits, logits, ids.astype(np.int32), weights.astype(np.float32))


def test_margin_without_groups():
    score, logit = formulas.margins(np.array([[3.0, 2.0, 1.5, 0, 0, 0, 0, 0]]), GREEDY)
    scores = formulas.softmax(np.array([3.0, 2.0, 1.5, 0, 0, 0, 0, 0]))
    np.testing.assert_allclose([logit[0], score[0]], [0.5, scores[1] - scores[2]])


def test_margin_between_groups_counts():
    logits = np.array([[5.0, 4.0, 3.0, 0.0, 2.99, 0.0, 1.0, 0.0]])  # groups of two: best 5, 3, 2.99, 1; two are kept
    _, logit = formulas.margins(logits, CONFIG)
    np.testing.assert_allclose(logit, [0.01], atol=1e-12)


def test_a_group_outside_does_not_count():
    logits = np.array([[5.0, 4.0, 3.5, 0.0, 3.0, 2.99, 1.0, 0.0]])
    _, logit = formulas.margins(logits, CONFIG)
    np.testing.assert_allclose(logit, [0.5])  # 4.0 against 3.5, and group 3.5 against group 3.0


def test_flip_on_a_near_tie_is_explained():
    a = np.array([[3.0, 2.0, 1.999, 0, 0, 0, 0, 0], [3.0, 2.0, 1.0, 0, 0, 0, 0, 0]])
    found = routing.compare(1, routed(a), routed(a + np.array([0, -1e-3, 1e-3, 0, 0, 0, 0, 0])), GATE, GREEDY)
    assert found.agreement == 0.5
    assert [(f.token, f.explained, f.reference_ids, f.found_ids) for f in found.flips] == [(0, True, [0, 1], [0, 2])]


def test_flip_far_from_a_tie_is_an_error():
    a = np.array([[3.0, 2.0, 1.0, 0, 0, 0, 0, 0]])
    wrong = dataclasses.replace(routed(a), ids=np.array([[0, 2]], np.int32))
    assert [f.explained for f in routing.compare(1, routed(a), wrong, GATE, GREEDY).flips] == [False]


def test_logits_that_move_more_than_their_input_allows_are_an_error():
    a = np.array([[3.0, 2.0, 1.0, 0, 0, 0, 0, 0]])
    moved = routed(np.array([[3.0, 1.0, 2.0, 0, 0, 0, 0, 0]]))
    moved = dataclasses.replace(moved, router_input=a)  # same input, other logits: the router's product is wrong
    assert [f.explained for f in routing.compare(1, routed(a), moved, GATE, GREEDY).flips] == [False]


def test_a_choice_that_does_not_follow_from_the_routers_own_logits_is_an_error():
    a = np.array([[3.0, 2.0, 1.0, 0, 0, 0, 0, 0]])
    wrong = dataclasses.replace(routed(a + 1.0), ids=np.array([[0, 2]], np.int32))  # logits moved, their order did not
    assert [f.explained for f in routing.compare(1, routed(a), wrong, GATE, GREEDY).flips] == [False]


def test_exact_ties_are_explained():
    a = np.zeros((4, 8))
    other = dataclasses.replace(routed(a), ids=np.full((4, 2), [6, 7], np.int32))
    found = routing.compare(1, routed(a), other, GATE, GREEDY)
    assert found.agreement == 0 and all(f.explained and f.score_margin == 0 for f in found.flips)


def test_weights_are_held_to_the_formula_on_the_routers_own_logits():
    """However far its logits are from the reference's; the order of the chosen does not count."""
    a = np.array([[3.0, 2.0, 1.0, 0, 0, 0, 0, 0], [0.0, 1.0, 5.0, 2.0, 0, 0, 0, 0]])
    right = routed(a + np.linspace(0, 1, 8))
    right = dataclasses.replace(right, ids=right.ids[:, ::-1], weights=right.weights[:, ::-1])
    assert routing.compare(1, routed(a), right, GATE, GREEDY).formula_error < 1e-6
    wrong = dataclasses.replace(right, weights=right.weights / 1.25)
    expected = 0.2 * right.weights.max()
    np.testing.assert_allclose(routing.compare(1, routed(a), wrong, GATE, GREEDY).formula_error, expected, rtol=1e-5)
