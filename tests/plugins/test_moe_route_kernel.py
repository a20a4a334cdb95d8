"""The routing kernel, interpreted, against the plain torch form: ids exactly, weights to float32 rounding."""

import pytest
import torch

from latentrt.plugins.launch.plan import PlanError
from latentrt.plugins.moe_route.kernel import moe_route
from latentrt.plugins.moe_route.reference import moe_route as reference

LIMITED, GREEDY = "group_limited_greedy", "greedy"
# experts, groups, kept groups, top_k, scores, method, group score, normalize, bias
CASES = {
    "V2": (160, 8, 3, 6, "softmax", LIMITED, "max", 0, False),
    "V2-Lite": (64, 1, 1, 6, "softmax", GREEDY, "max", 0, False),
    "V3": (256, 8, 4, 8, "sigmoid", LIMITED, "top2_sum", 1, True),
    "tiny": (16, 4, 2, 4, "softmax", LIMITED, "max", 0, False),
    "odd groups": (30, 3, 2, 4, "sigmoid", LIMITED, "top2_sum", 1, True),
    "biased softmax": (20, 5, 1, 3, "softmax", LIMITED, "max", 1, True),
    "all experts": (12, 1, 1, 12, "softmax", GREEDY, "max", 1, True),
    "few in kept groups": (16, 8, 1, 4, "sigmoid", LIMITED, "top2_sum", 0, False),
}


def check(logits, num_tokens, case, scale=16.0):
    experts, n_group, topk_group, top_k, scoring, method, group_score, normalize, biased = CASES[case]
    generator = torch.Generator().manual_seed(7)
    bias = torch.randn(experts, generator=generator) if biased else None
    attributes = (scoring, method, group_score, n_group, topk_group, top_k, normalize, scale)
    count = torch.tensor([num_tokens], dtype=torch.int32)
    ids, weights = moe_route(logits, count, bias, *attributes)
    expected_ids, expected_weights = reference(logits, count, bias, *attributes)
    assert torch.equal(ids, expected_ids)
    # softmax over E terms and one division: a few units of 2^-23 of the largest weight
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=2e-6 * scale)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 4, 37])
def test_random_logits(case, tokens):
    logits = torch.randn(tokens, CASES[case][0], generator=torch.Generator().manual_seed(tokens)) * 3
    check(logits, tokens, case)


@pytest.mark.parametrize("case", CASES)
def test_ties_go_to_the_lowest_index(case):
    generator = torch.Generator().manual_seed(3)
    equal = torch.zeros(2, CASES[case][0])
    coarse = torch.randint(-1, 2, (9, CASES[case][0]), generator=generator).float()
    check(torch.cat([equal, coarse]), 11, case)


@pytest.mark.parametrize("case", ["V2", "odd groups"])
def test_padding_rows(case):
    logits = torch.randn(9, CASES[case][0], generator=torch.Generator().manual_seed(1))
    logits[6:] = float("nan")
    check(logits, 6, case)
    check(logits, 0, case)


def test_large_logits_do_not_overflow():
    logits = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)) * 1e4
    check(logits, 5, "V2-Lite")


def test_logits_need_not_be_contiguous():
    logits = torch.randn(64, 11, generator=torch.Generator().manual_seed(2)).T
    check(logits, 11, "V2-Lite")


def test_refuses_groups_of_unequal_size():
    with pytest.raises(PlanError, match="equal groups"):
        moe_route(torch.zeros(1, 10), torch.ones(1, dtype=torch.int32), None, "softmax", LIMITED, "max", 3, 1, 2, 0, 1.0)
