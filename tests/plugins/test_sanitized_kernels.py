"""Kernels under the sanitizer: nothing out of bounds, no race, nothing read unwritten; and the sanitizer bites."""

import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from latentrt.plugins import cache_formats
from latentrt.plugins.architecture import ARCHITECTURES, Gpu
from latentrt.plugins.mla_attention.kernel import mla_attention_
from latentrt.plugins.mla_prefill.kernel import mla_prefill_
from latentrt.plugins.moe_experts.kernel import moe_experts
from latentrt.plugins.moe_route.kernel import moe_route
from latentrt.plugins.sampling.kernel import choose
from tests.plugins.sanitizer import Sanitizer

HEADS, RANK, ROPE, PAGE = 3, 64, 16, 16
CAPABILITIES = tuple(ARCHITECTURES)
# of a single token, rows of pairs that no expert here takes are quantized too, whatever they hold; no product reads them
ALLOWED = {"quantize: source is read before it was written"}


@triton.jit
def copy(source, target, count, SHIFT: tl.constexpr, STRIDE: tl.constexpr, FROM_TARGET: tl.constexpr,  # noqa: N803
         BLOCK: tl.constexpr):  # fmt: skip # noqa: N803
    """What is right with SHIFT 0, STRIDE BLOCK and FROM_TARGET 0."""
    at = tl.program_id(0) * STRIDE + tl.arange(0, BLOCK)
    x = tl.load((target if FROM_TARGET else source) + at + FROM_TARGET, mask=at + FROM_TARGET < count + SHIFT, other=0.0)
    tl.store(target + at, x, mask=at < count)


@pytest.mark.parametrize(("constants", "fault"), [
    (dict(SHIFT=0, STRIDE=8, FROM_TARGET=0), None),
    (dict(SHIFT=1, STRIDE=8, FROM_TARGET=0), "load outside of all tensors"),
    (dict(SHIFT=0, STRIDE=7, FROM_TARGET=0), "two programs write target"),
    (dict(SHIFT=0, STRIDE=8, FROM_TARGET=1), "a program (reads what another writes|writes what another reads), target"),
])  # fmt: skip
def test_seeded_faults_are_found(constants, fault):
    source, target = torch.randn(30), torch.zeros(30)
    with Sanitizer(0) as found:
        try:
            copy[(4 if constants["STRIDE"] == 8 else 5,)](source, target, 30, BLOCK=8, **constants)
        except IndexError:
            assert "outside" in fault
    assert (found.faults == []) == (fault is None)
    if fault:
        assert any(re.search(fault, f) for f in found.faults), found.faults
    else:
        assert torch.equal(source, target)


def test_a_read_of_what_nobody_wrote_is_found():
    with Sanitizer(0) as found:
        workspace = torch.empty(32)
        copy[(4,)](workspace, torch.zeros(32), 32, SHIFT=0, STRIDE=8, FROM_TARGET=0, BLOCK=8)
    assert found.faults == ["copy: source is read before it was written"]


def batch(rng: np.random.Generator, cache_format: str) -> tuple:
    """A ragged batch: new and cached tokens of sequences, pages in any order, unused slots far outside, rows of padding."""
    count = int(rng.choice([1, 2, 5]))
    new, past = rng.choice([0, 1, 1, 5, 20], count), rng.choice([0, 1, 15, 16, 17, 40], count)
    new[0] = max(new[0], 1)
    used = -(-(new + past) // PAGE)
    pages = iter(rng.permutation(np.arange(1, 1 + used.sum())))
    table = np.full((count, max(used.max(), 1) + int(rng.integers(0, 3))), 2**30, np.int32)
    for n in range(count):
        table[n, : used[n]] = [next(pages) for _ in range(used[n])]
    layout, rows = cache_formats.get(cache_format), int(new.sum() + rng.integers(0, 4))
    tokens = layout.encode(randn(int(used.sum()) + 1, PAGE, RANK), randn(int(used.sum()) + 1, PAGE, ROPE)).to(layout.dtype)
    ints = [torch.tensor(np.asarray(x), dtype=torch.int32) for x in (table, past, np.cumsum([0, *new]), [new.sum()])]
    return rows, tokens.contiguous(), ints


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


def attention(rng, cache_format, target):
    rows, cache, (table, past, starts, count) = batch(rng, cache_format)
    q = randn(rows, HEADS, RANK), randn(rows, HEADS, ROPE), randn(rows, RANK), randn(rows, ROPE)
    return lambda: (mine := cache.clone(), mla_attention_(*q, mine, table, past, starts, count, 0.1, cache_format, target))


def expanded(rng, cache_format, target):
    rows, cache, (table, past, starts, count) = batch(rng, cache_format)
    q = randn(rows, HEADS, 32), randn(rows, HEADS, ROPE), randn(rows, RANK), randn(rows, ROPE)
    weights, segment = (randn(HEADS, 32, RANK) / 8, randn(HEADS, RANK, 16) / 8), rng.choice([128, None])
    segment = None if segment is None else int(segment)

    def call():
        mine = cache.clone()
        return mine, mla_prefill_(*q, *weights, mine, table, past, starts, count, 0.1, cache_format, target, segment)

    return call


def experts(rng, cache_format, target):
    tokens, number = int(rng.choice([1, 7, 40])), 8
    ids = torch.stack([torch.randperm(number + 1)[:3] for _ in range(tokens)]).int()
    ids[0] = -1
    weights = randn(number, 96, 64) / 8, randn(number, 64, 48) / 8
    scales, attributes = (None, None), {}
    if rng.integers(2):  # int4
        weights = tuple(torch.randint(-128, 128, (number, *shape), dtype=torch.int8) for shape in ((128, 32), (64, 32)))
        scales, attributes = (torch.rand(number, 128, 2), torch.rand(number, 64, 1)), {"packed": 2}
    elif target.capability >= 89:
        weights, scales = tuple(w.to(torch.float8_e4m3fn) for w in weights), (torch.rand(number, 96), torch.rand(number, 64))
    x, share = randn(tokens, 64), torch.rand(tokens, 3)
    return lambda: (moe_experts(x, ids, share, *weights, *scales, 0, "concatenated", target, **attributes),)


def routing(rng, cache_format, target):
    logits, count = torch.randn(9, 40), torch.tensor([int(rng.integers(0, 10))], dtype=torch.int32)
    options = dict(scoring_func="softmax", topk_method="group_limited_greedy", group_score="max", n_group=8, topk_group=3,
                   top_k=6, norm_topk_prob=0, routed_scaling_factor=2.0)  # fmt: skip
    return lambda: moe_route(logits, count, None, **options, target=target)


def drawing(rng, cache_format, target):
    logits = torch.randn(3, 5000)
    numbers = torch.tensor([[0.0, 1, 0, 0], [1.0, 0.9, 0, 0.3], [0.7, 1, 0.05, 0.8]], dtype=torch.float64)
    return lambda: choose(logits, numbers, torch.tensor([0, 0, 20], dtype=torch.int32))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [attention, expanded, experts, routing, drawing])
def test_kernels_touch_what_is_theirs(make, seed):
    """Random ragged cases, an architecture and a cache format each; the order of programs changes no bit."""
    rng, formats = np.random.default_rng(100 * seed + 7), ("bfloat16", *cache_formats.PACKED)
    torch.manual_seed(seed)
    capability = CAPABILITIES[int(rng.integers(len(CAPABILITIES)))]
    call = make(rng, formats[int(rng.integers(len(formats)))], Gpu.of(capability, int(rng.choice([2, 8, 132]))))
    expected = call()
    with Sanitizer(seed) as found:
        results = call()
    assert set(found.faults) <= ALLOWED
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))
