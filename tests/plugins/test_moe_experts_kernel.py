"""The expert kernels, interpreted, against the plain torch form."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from latentrt.plugins import ops, trt_base
from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch.plan import PlanError
from latentrt.plugins.moe_experts import kernel
from latentrt.plugins.moe_experts.kernel import moe_experts
from latentrt.plugins.moe_experts.reference import moe_experts as reference

pytestmark = pytest.mark.slow

HIDDEN, INNER, TOP_K = 192, 48, 4  # neither is a multiple of the block sizes
# norm of the error over norm of the result: inner, outer and sum are rounded once each (to 8 or 11 bits)
ROUNDING = {torch.bfloat16: 3 * 2**-9, torch.float16: 3 * 2**-12}
# e4m3 keeps 4 bits: rounding x and inner costs 2^-4 / sqrt(12) each, and outliers of a row coarsen the rest of it
FLOAT8_ROUNDING = 0.08


def weights(experts, float8, dtype):
    generator = torch.Generator().manual_seed(experts)
    gate_up = torch.randn(experts, 2 * INNER, HIDDEN, generator=generator) * HIDDEN**-0.5
    down = torch.randn(experts, HIDDEN, INNER, generator=generator) * INNER**-0.5
    if not float8:
        return gate_up.to(dtype), down.to(dtype), None, None
    scales = [w.abs().amax(-1) / 448 for w in (gate_up, down)]
    quantized = [(w / s[..., None]).to(torch.float8_e4m3fn) for w, s in zip((gate_up, down), scales, strict=True)]
    return *quantized, *scales


def choices(tokens, experts, kind):
    """topk_ids [T, TOP_K]: "random", "one" (an expert that every token goes to), "few" (the others get none)."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:TOP_K] for _ in range(tokens)]).int()
    if kind == "one":
        ids[:, 0], ids[:, 1:] = 2, torch.tensor([-1] * (TOP_K - 1))
    if kind == "few":
        ids = ids % 2 + torch.tensor([0, 2, 4, 6]).int()
    return ids


def rounded(x):
    """Rows as FP8 with a scale each, back in float32: what `quantize` does to them."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-10) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn).float() * scale


def emulated(x, ids, probabilities, gate_up, down, gate_up_scale, down_scale, first_expert):
    """The reference, with rows rounded to FP8 where the kernels round them."""
    y = torch.zeros(x.shape)
    for e, matrices in enumerate(zip(gate_up, gate_up_scale, down, down_scale, strict=True)):
        gate_up_e, gate_up_s, down_e, down_s = (m.float() for m in matrices)
        tokens, chosen = torch.where(ids == first_expert + e)
        gate, up = F.linear(rounded(x[tokens]), gate_up_e * gate_up_s[:, None]).chunk(2, -1)
        inner = rounded((F.silu(gate) * up).to(x.dtype))
        y.index_add_(0, tokens, F.linear(inner, down_e * down_s[:, None]) * probabilities[tokens, chosen, None])
    return y


def error(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def run(tokens, kind, float8, dtype, target, first=0, experts=8, local=8, layout="concatenated"):
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    ids = choices(tokens, experts, kind)
    ids[tokens - tokens // 4 :] = -1  # padding rows
    probabilities = torch.rand(tokens, TOP_K, generator=torch.Generator().manual_seed(2))
    arguments = (x, ids, probabilities, *weights(local, float8, dtype), first)
    return arguments, moe_experts(*arguments, layout, target), reference(*arguments, layout)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("tokens", "kind"), [(1, "random"), (13, "random"), (50, "one"), (70, "few"), (210, "random")])
def test_products(capability, tokens, kind):
    dtype = torch.float16 if tokens == 13 else torch.bfloat16
    _, y, expected = run(tokens, kind, False, dtype, Gpu.of(capability))
    assert error(y, expected) <= ROUNDING[dtype]
    assert not y[tokens - tokens // 4 :].any()


@pytest.mark.parametrize(
    ("capability", "tokens", "kind"),
    [(90, 1, "random"), (89, 13, "few"), (90, 13, "random"), (90, 70, "one"), (89, 210, "random")],
)
def test_float8(capability, tokens, kind):
    arguments, y, expected = run(tokens, kind, True, torch.bfloat16, Gpu.of(capability))
    assert error(y, expected) <= FLOAT8_ROUNDING
    # against the same roundings: float32 sums in another order move few values across a rounding boundary of e4m3
    assert error(y, emulated(*arguments)) <= ROUNDING[torch.bfloat16] + 2**-8


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("first", [0, 5, 12])
def test_local_slice(float8, first):
    arguments, y, expected = run(19, "random", float8, torch.bfloat16, Gpu.of(90), first, experts=16, local=4)
    assert error(y, emulated(*arguments) if float8 else expected) <= ROUNDING[torch.bfloat16] + 2**-8 * float8


def test_slices_add_up():
    x, ids = torch.randn(9, HIDDEN).bfloat16(), choices(9, 8, "random")
    probabilities, tensors = torch.rand(9, TOP_K), weights(8, False, torch.bfloat16)
    whole = moe_experts(x, ids, probabilities, *tensors, 0, "concatenated").float()
    parts = [
        moe_experts(x, ids, probabilities, tensors[0][s], tensors[1][s], None, None, s.start, "concatenated").float()
        for s in (slice(0, 3), slice(3, 8))
    ]
    assert error(sum(parts), whole) <= ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("float8", [False, True])
def test_interleaved_layout(float8):
    x, ids, probabilities = torch.randn(7, HIDDEN).bfloat16(), choices(7, 8, "random"), torch.rand(7, TOP_K)
    gate_up, down, gate_up_scale, down_scale = weights(8, float8, torch.bfloat16)
    order = torch.arange(2 * INNER).view(2, INNER).T.flatten()  # gate 0, up 0, gate 1, ...
    scale = gate_up_scale[:, order] if float8 else None
    mixed = moe_experts(x, ids, probabilities, gate_up[:, order], down, scale, down_scale, 0, "interleaved")
    plain = moe_experts(x, ids, probabilities, gate_up, down, gate_up_scale, down_scale, 0, "concatenated")
    assert torch.equal(mixed, plain)


def test_no_expert_at_all():
    _, y, _ = run(6, "random", False, torch.bfloat16, Gpu.of(90), first=100)
    assert not y.any()


@pytest.mark.parametrize("by_pair", [0, 1])
@pytest.mark.parametrize("ids", [[3, 3, 0, 9, -1, 3, 2, 2] * 5, [4] * 40, [-1] * 40])
def test_sort_writes_every_tile(ids, by_pair):
    """Experts 2 .. 6 local; the table says which expert a tile has, or that it has none, whatever was there before."""
    first, experts, block = 2, 5, 4
    topk_ids, tiles = torch.tensor(ids, dtype=torch.int32), 40 if by_pair else 40 // block + experts
    order, table = torch.full((41,), 777, dtype=torch.int32), torch.full((tiles + 1, 4), 777, dtype=torch.int32)
    kernel.sort[(experts,)](topk_ids, order, table, 40, tiles, by_pair, first, EXPERTS=experts, BLOCK_M=block, BLOCK=16)
    by_expert = {e: [i for i, x in enumerate(ids) if x - first == e] for e in range(experts)}
    local = list(itertools.chain(*by_expert.values()))
    assert order.tolist() == local + [777] * (41 - len(local))
    assert table[tiles].tolist() == [777] * 4 and 777 not in table[:tiles, 0].tolist()
    found = {e: [] for e in range(experts)}
    for expert, begin, end, _ in table[:tiles].tolist():
        if expert >= 0:
            assert 0 < end - begin <= block
            found[expert] += order[begin:end].tolist()
    assert found == by_expert


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("ids", [[5, 2, 7, 3], [-1, 4, 40, 2], [4, 4, 1, 4], [-1, -1, 0, 9]])
def test_a_token_alone_gives_the_bits_it_gives_among_others(ids, float8):
    """Experts 2 .. 6 local. A single token's pairs are not sorted."""
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(3)).bfloat16()
    ids = torch.cat([torch.tensor([ids]), choices(2, 8, "random")]).int()
    probabilities = torch.rand(3, TOP_K, generator=torch.Generator().manual_seed(4))
    tensors = weights(5, float8, torch.bfloat16)
    among = moe_experts(x, ids, probabilities, *tensors, 2, "concatenated")
    alone = moe_experts(x[:1], ids[:1], probabilities[:1], *tensors, 2, "concatenated")
    assert torch.equal(alone, among[:1]) and not alone.isnan().any()


def test_order_of_rows_does_not_matter():
    x, ids, probabilities = torch.randn(21, HIDDEN).bfloat16(), choices(21, 8, "random"), torch.rand(21, TOP_K)
    tensors, order = weights(8, False, torch.bfloat16), torch.randperm(21)
    y = moe_experts(x, ids, probabilities, *tensors, 0, "concatenated")
    shuffled = moe_experts(x[order], ids[order], probabilities[order], *tensors, 0, "concatenated")
    assert torch.equal(shuffled, y[order])


def test_inputs_need_not_be_contiguous():
    x, ids, probabilities = torch.randn(HIDDEN, 5).bfloat16().T, choices(5, 8, "random"), torch.rand(TOP_K, 5).T
    tensors = weights(8, False, torch.bfloat16)
    y = moe_experts(x, ids.T.contiguous().T, probabilities, *tensors, 0, "concatenated")
    assert error(y, reference(x, ids, probabilities, *tensors, 0, "concatenated")) <= ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_block_scales_are_refused(name):
    """By the launcher on torch tensors, and by the plugin, while an engine is built."""
    scales = dict(gate_up_scale=torch.ones(4, 2 * INNER), down_scale=torch.ones(4, HIDDEN))
    scales[f"{name}_scale"] = scales[f"{name}_scale"][..., None].repeat(1, 1, 2)
    tensors = dict(
        x=torch.zeros(3, HIDDEN).bfloat16(), topk_ids=choices(3, 8, "random"), topk_weights=torch.rand(3, TOP_K),
        gate_up_proj=torch.zeros(4, 2 * INNER, HIDDEN).to(torch.float8_e4m3fn),
        down_proj=torch.zeros(4, HIDDEN, INNER).to(torch.float8_e4m3fn), **scales,
    )  # fmt: skip
    attributes = dict(first_expert=0, gate_up_layout="concatenated")
    message = f"moe_experts kernels: {name}_blocks is 2, accepted: 1, a scale per output channel"
    with pytest.raises(PlanError, match=message):
        moe_experts(**tensors, **attributes, target=Gpu.of(90))
    plugin = ops.plugins()["MoeExperts"]
    sizes = trt_base.sizes(plugin.contract, [t.shape for t in tensors.values()])
    with pytest.raises(PlanError, match=message):
        plugin.configure(attributes, sizes, {k: str(t.dtype).removeprefix("torch.") for k, t in tensors.items()})


def test_float8_is_refused_where_the_hardware_has_none():
    with pytest.raises(PlanError, match="sm_86 has no FP8"):
        run(3, "random", True, torch.bfloat16, Gpu.of(86))
