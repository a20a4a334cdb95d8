"""The expert kernels over int4 weights, interpreted, against the formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.export.quantization.int4 import pack
from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch.plan import PlanError
from latentrt.plugins.moe_experts.kernel import moe_experts
from latentrt.plugins.moe_experts.plan import Experts
from latentrt.plugins.moe_experts.reference import moe_experts as reference
from tests.plugins.test_moe_experts_kernel import ROUNDING, choices, error

pytestmark = pytest.mark.slow

TOP_K = 4
ATTRIBUTES = dict(gate_up_layout="concatenated", packed=2)


def quantized(generator, experts, outputs, inputs, block):
    """Random codes in bytes, scales of either sign, and the weights by the formula, float64 [E, outputs, inputs]."""
    codes = torch.randint(0, 16, (experts, outputs, inputs), generator=generator, dtype=torch.uint8)
    scale = torch.randn(experts, outputs, inputs // block, generator=generator) * inputs**-0.5 / 4
    real = (codes.double() - 8) * scale.double().repeat_interleave(block, -1)
    return pack(codes).view(torch.int8), scale, real


def formula(x, ids, shares, gate_up, down, first):
    """y [T, hidden] float64, pair by pair; gate_up and down are the real weights."""
    y, inner = torch.zeros(x.shape, dtype=torch.float64), down.shape[2]
    for token, chosen in enumerate((ids - first).tolist()):
        for choice, expert in enumerate(chosen):
            if 0 <= expert < len(down):
                both = gate_up[expert] @ x[token].double()
                gate, up = both[:inner], both[inner:]
                y[token] += shares[token, choice].double() * (down[expert] @ (gate * torch.sigmoid(gate) * up))
    return y


def case(tokens, kind="random", hidden=192, inner=96, blocks=(64, 32), experts=8, local=8, dtype=torch.bfloat16):
    """Inputs of the op, and the real weights."""
    generator = torch.Generator().manual_seed(tokens)
    gate_up, gate_up_scale, real_gate_up = quantized(generator, local, 2 * inner, hidden, blocks[0])
    down, down_scale, real_down = quantized(generator, local, hidden, inner, blocks[1])
    x, shares = torch.randn(tokens, hidden, generator=generator).to(dtype), torch.rand(tokens, TOP_K, generator=generator)
    ids = choices(tokens, experts, kind)
    ids[tokens - tokens // 4 :] = -1  # padding rows
    return (x, ids, shares, gate_up, down, gate_up_scale, down_scale), (real_gate_up, real_down)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", [89, 90, 100])
@pytest.mark.parametrize(("tokens", "kind"), [(1, "random"), (13, "random"), (50, "one"), (70, "few"), (210, "random")])
def test_products(capability, tokens, kind, dtype):
    """Every tile: on 90 the largest is plain, all others are swapped."""
    inputs, real = case(tokens, kind, dtype=dtype)
    y = moe_experts(*inputs, first_expert=0, **ATTRIBUTES, target=Gpu.of(capability))
    assert error(y, formula(*inputs[:3], *real, 0)) <= ROUNDING[dtype]
    assert not y[tokens - tokens // 4 :].any()


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_shapes(data):
    blocks = data.draw(st.tuples(*[st.sampled_from((32, 64, 128))] * 2))
    hidden, inner = (block * data.draw(st.integers(1, 3)) for block in blocks)
    local, first = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 6))
    tokens, capability = data.draw(st.integers(1, 24)), data.draw(st.sampled_from((80, 90, 120)))
    inputs, real = case(tokens, hidden=hidden, inner=inner, blocks=blocks, local=local)
    y = moe_experts(*inputs, first_expert=first, **ATTRIBUTES, target=Gpu.of(capability))
    expected = formula(*inputs[:3], *real, first)
    assert (y.double() - expected).norm() <= ROUNDING[torch.bfloat16] * expected.norm()


def test_the_reference_takes_both_kinds_of_bytes():
    """TensorRT has no uint8; the bits are the same."""
    inputs, real = case(9)
    signed = reference(*inputs, first_expert=0, **ATTRIBUTES)
    octets = (weight.view(torch.uint8) for weight in inputs[3:5])
    unsigned = reference(*inputs[:3], *octets, *inputs[5:], first_expert=0, **ATTRIBUTES)
    assert torch.equal(signed, unsigned)
    assert error(signed, formula(*inputs[:3], *real, 0)) <= ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("tokens", [7, 150])
def test_interleaved_layout(tokens):
    x, ids, shares, gate_up, down, gate_up_scale, down_scale = case(tokens)[0]
    order = torch.arange(gate_up.shape[1]).view(2, -1).T.flatten()  # gate 0, up 0, gate 1, ...
    plain = moe_experts(x, ids, shares, gate_up, down, gate_up_scale, down_scale, 0, "concatenated", packed=2)
    mixed = moe_experts(
        x, ids, shares, gate_up[:, order], down, gate_up_scale[:, order], down_scale, 0, "interleaved", packed=2
    )
    assert torch.equal(mixed, plain)


def test_a_token_alone_gives_the_bits_it_gives_among_others():
    """Few rows are split in registers and many before, which changes no sum."""
    inputs, _ = case(300)
    among = moe_experts(*inputs, first_expert=0, **ATTRIBUTES, target=Gpu.of(89))
    for n in (1, 20):
        rows = [t[:n] for t in inputs[:3]]
        alone = moe_experts(*rows, *inputs[3:], first_expert=0, **ATTRIBUTES, target=Gpu.of(89))
        assert torch.equal(alone, among[:n]) and not alone.isnan().any()


@pytest.mark.parametrize(("field", "value", "accepted"), [
    ("gate_up_blocks", 1, "192 inputs / (128, 64, 32)"), ("down_blocks", 4, "64 inputs / (128, 64, 32)"),
    ("packed", 1, "2 with int8 weights"), ("moe_intermediate_size", 40, "multiples of 16"),
])  # fmt: skip
def test_what_no_kernel_takes(field, value, accepted):
    fields = dict(num_experts=8, hidden_size=192, moe_intermediate_size=64, top_k=4, dtype="bfloat16", weights="int8",
                  first_expert=0, gate_up_layout="concatenated", gate_up_blocks=3, down_blocks=1, packed=2)  # fmt: skip
    Experts(**fields)
    with pytest.raises(PlanError) as refusal:
        Experts(**fields | {field: value})
    assert str(refusal.value) == f"moe_experts kernels: {field} is {value}, accepted: {accepted}"
