"""The plain torch forms of routing and experts against formulas written out here in float64, one token at a time."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.plugins.moe_experts.reference import moe_experts
from latentrt.plugins.moe_route.reference import moe_route

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
# float32 sums of some dozen products of size 1: 1e-5 is a hundred roundings
TOLERANCE = 1e-5


def int32(values):
    return torch.tensor(list(values), dtype=torch.int32)


def route_one(logits: list[float], bias, scoring, method, group_score, n_group, topk_group, top_k, normalize, factor):
    """One token in plain Python: (expert, weight) pairs, best first, ties to the lowest index."""
    if scoring == "softmax":
        exps = [math.exp(v - max(logits)) for v in logits]
        scores = [e / sum(exps) for e in exps]
    else:
        scores = [1 / (1 + math.exp(-v)) for v in logits]
    choice = [s + (bias[e] if bias else 0) for e, s in enumerate(scores)]
    if method == "group_limited_greedy":
        size = len(logits) // n_group
        groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(n_group)]
        value = [members[0] if group_score == "max" else sum(members[:2]) for members in groups]
        kept = sorted(range(n_group), key=lambda g: (-value[g], g))[:topk_group]
        choice = [c if e // size in kept else 0.0 for e, c in enumerate(choice)]
        scores = [s if e // size in kept or bias else 0.0 for e, s in enumerate(scores)]
    chosen = sorted(range(len(logits)), key=lambda e: (-choice[e], e))[:top_k]
    total = sum(scores[e] for e in chosen) + 1e-20 if normalize else 1.0
    return [(e, scores[e] / total * factor) for e in chosen]


@st.composite
def routings(draw):
    n_group, size = draw(st.sampled_from([(1, 7), (2, 3), (4, 2), (3, 4)]))
    return {
        "scoring_func": draw(st.sampled_from(["softmax", "sigmoid"])),
        "topk_method": draw(st.sampled_from(["greedy", "group_limited_greedy"])),
        "group_score": draw(st.sampled_from(["max", "top2_sum"])), "n_group": n_group,
        "topk_group": draw(st.integers(1, n_group)), "top_k": draw(st.integers(1, n_group * size)),
        "norm_topk_prob": draw(st.integers(0, 1)), "routed_scaling_factor": draw(st.sampled_from([1.0, 16.0])),
    }, n_group * size, draw(st.booleans()), draw(st.integers(0, 99))  # fmt: skip


@SETTINGS
@given(routings())
def test_moe_route(case):
    attributes, experts, biased, seed = case
    g = torch.Generator().manual_seed(seed)
    # steps of 1/4: many exact ties, and otherwise gaps that no rounding can bridge
    logits = torch.randint(-8, 9, (6, experts), generator=g).float() / 4
    bias = torch.randint(0, 5, (experts,), generator=g).float() / 8 if biased else None
    ids, weights = moe_route(logits, int32([4]), bias, **attributes)
    assert (ids[4:] == -1).all() and (weights[4:] == 0).all()
    for token in range(4):
        expected = route_one(logits[token].tolist(), bias.tolist() if biased else None, *attributes.values())
        assert ids.dtype == torch.int32 and weights.dtype == torch.float32
        found = list(zip(ids[token].tolist(), weights[token].tolist(), strict=True))
        assert [w for _, w in found] == pytest.approx([w for _, w in expected], rel=TOLERANCE, abs=1e-7)
        if not biased:  # a sum of score and bias may tie in float64 and not in float32
            assert [e for e, _ in found] == [e for e, _ in expected]


def test_moe_route_all_scores_tied():
    """Equal logits everywhere: the lowest groups and experts, exactly."""
    attributes = ("softmax", "group_limited_greedy", "max", 4, 2, 3, 0, 1.0)
    ids, weights = moe_route(torch.zeros(2, 12), int32([2]), None, *attributes)
    assert ids.tolist() == [[0, 1, 2]] * 2 and torch.allclose(weights, torch.tensor(1 / 12))


@SETTINGS
@given(
    st.integers(0, 6), st.integers(1, 4), st.sampled_from(["concatenated", "interleaved"]),
    st.sampled_from(["float", "channel scales", "block scales"]), st.integers(0, 99),
)  # fmt: skip
def test_moe_experts(tokens, top_k, layout, kind, seed):
    """Token by token, choice by choice, in float64; ids may repeat, and ids outside 0 .. E add nothing."""
    g = torch.Generator().manual_seed(seed)
    experts, hidden, inner = 5, 6, 4
    x, weights = torch.randn(tokens, hidden, generator=g), torch.rand(tokens, top_k, generator=g)
    ids = torch.randint(-1, experts + 2, (tokens, top_k), generator=g).int()
    gate_up, down = torch.randn(experts, 2 * inner, hidden, generator=g), torch.randn(experts, hidden, inner, generator=g)
    real, real_down, scales = gate_up.double(), down.double(), (None, None)
    if kind != "float":
        gate_up, down = (torch.randint(0, 256, t.shape, generator=g).to(torch.uint8) for t in (gate_up, down))
        blocks = [(), ()] if kind == "channel scales" else [(3,), (2,)]  # of 2 inputs each
        scales = [torch.rand(*t.shape[:2], *b, generator=g) / 64 for t, b in zip((gate_up, down), blocks, strict=True)]
        real, real_down = (real_weight(*pair) for pair in zip((gate_up, down), scales, strict=True))
    gate, up = real.chunk(2, 1) if layout == "concatenated" else (real[:, 0::2], real[:, 1::2])
    expected = torch.zeros(tokens, hidden, dtype=torch.float64)
    for t in range(tokens):
        for k in range(top_k):
            e = int(ids[t, k])
            if 0 <= e < experts:
                g_out, u_out = gate[e] @ x[t].double(), up[e] @ x[t].double()
                expected[t] += weights[t, k].double() * (real_down[e] @ (g_out / (1 + torch.exp(-g_out)) * u_out))
    found = moe_experts(x, ids, weights, gate_up, down, *scales, first_expert=0, gate_up_layout=layout)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=TOLERANCE)


def real_weight(weight, scale):
    """Element by element: [E, outputs, inputs] uint8 times [E, outputs] or [E, outputs, blocks], in float64."""
    real = torch.empty(weight.shape, dtype=torch.float64)
    for e, o, i in itertools.product(*map(range, weight.shape)):
        factor = scale[e, o] if scale.dim() == 2 else scale[e, o, i * scale.shape[2] // weight.shape[2]]
        real[e, o, i] = (int(weight[e, o, i]) - 128) * factor.double()
    return real


def test_moe_experts_slices_add_up():
    """Expert parallelism: the sum over slices of the experts is the whole."""
    g = torch.Generator().manual_seed(6)
    x, weights = torch.randn(7, 6, generator=g), torch.rand(7, 2, generator=g)
    ids = torch.randint(0, 6, (7, 2), generator=g).int()
    gate_up, down = torch.randn(6, 8, 6, generator=g), torch.randn(6, 6, 4, generator=g)
    whole = moe_experts(x, ids, weights, gate_up, down, None, None, 0, "concatenated")
    parts = [
        moe_experts(x, ids, weights, gate_up[s : s + 2], down[s : s + 2], None, None, s, "concatenated") for s in (0, 2, 4)
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=TOLERANCE)


def test_moe_experts_reads_chosen_experts_only():
    gate_up, down = torch.full((4, 8, 6), float("nan")), torch.full((4, 6, 4), float("nan"))
    gate_up[2], down[2] = 0.5, 0.25
    y = moe_experts(
        torch.ones(3, 6), int32([2, 2, -1])[:, None], torch.ones(3, 1), gate_up, down, None, None, 0, "concatenated"
    )
    assert torch.isfinite(y).all() and (y[2] == 0).all() and (y[0] != 0).all()
