"""Launch plans: bounds that hold for every batch of a shape, workspaces, and what a plan may name."""

import itertools
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from latentrt.plugins.architecture import ARCHITECTURES, Gpu
from latentrt.plugins.launch.plan import ALIGNMENT, PlanError, bind, cdiv, place
from latentrt.plugins.mla_attention import plan as attention
from latentrt.plugins.mla_attention.tiles import TILES
from latentrt.plugins.mla_prefill import plan as prefill
from latentrt.plugins.moe_experts import plan as experts
from latentrt.plugins.moe_route import plan as route

TOKENS = (1, 2, 3, 7, 16, 64, 65, 300, 4096)


def attention_config(heads):
    return attention.Attention(heads, 512, 64, 64, "bfloat16", "bfloat16", 0.1)


def prefill_config(heads):
    return prefill.Prefill(heads, 512, 128, 64, 128, 64, "bfloat16", "bfloat16", 0.1)


def experts_config(weights="bfloat16", num_experts=64):
    blocks = (16, 11, 0, 2) if weights == "int8" else ()  # of 128 inputs, two to a byte
    return experts.Experts(num_experts, 2048, 1408, 6, "bfloat16", weights, 0, "concatenated", *blocks)


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("heads", [6, 16, 128])
def test_attention_plans_name_only_known_kernels(capability, heads):
    target, config = Gpu.of(capability), attention_config(heads)
    known, named = set(attention.kernels(config, target)), set()
    for tokens, sequences, pages in itertools.product(TOKENS, (1, 2, 64), (1, 16, 1024)):
        plan = attention.plan(config, tokens, sequences, pages, target)
        named |= set(plan.kernels)
        assert plan.workspace_bytes <= attention.workspace_bytes(config, target)
        assert all(1 <= n < 2**31 for launch in plan.launches for n in launch.grid)
        assert all(launch.grid[1] <= 65535 for launch in plan.launches)
    assert named <= known


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("heads", [6, 16, 128])
def test_prefill_plans_name_only_known_kernels(capability, heads):
    target, config = Gpu.of(capability), prefill_config(heads)
    named = set()
    for tokens, sequences, pages in itertools.product(TOKENS, (1, 2, 64), (1, 16, 1024)):
        plan = prefill.plan(config, tokens, sequences, pages, target)
        named |= set(plan.kernels)
        assert plan.workspace_bytes <= prefill.workspace_bytes(config, tokens, sequences, pages, target)
        assert plan.workspace_bytes <= prefill.workspace_bytes(config, TOKENS[-1], 64, 1024, target)
        assert all(1 <= n < 2**31 for launch in plan.launches for n in launch.grid)
        assert all(launch.grid[1] <= 65535 for launch in plan.launches)
    assert named == set(prefill.kernels(config, target))


@pytest.mark.parametrize(("heads", "segment"), [(16, 32768), (128, 4096), (1024, 1024)])
def test_prefill_segments_keep_to_their_budget(heads, segment):
    """256 MiB of keys and values, but 1024 slots at least; every slot that the block table can hold lies in one segment."""
    target, config = Gpu.of(90), prefill_config(heads)
    plan = prefill.plan(config, 300, 3, 600, target)
    sizes = {b.name: b.shape for b in plan.workspace}
    assert sizes["keys"] == (heads, segment, 128) and sizes["keys_pe"] == (segment, 64) and sizes["sums"] == (300, heads, 128)
    tokens = prefill.TILES[90].tokens
    grids = [launch.grid[0] for launch in plan.launches if launch.kernel.function == "expand"]
    assert len(grids) == cdiv(3 * 600 * 64, segment) and sum(grids) * tokens == 3 * 600 * 64


def test_prefill_workspace_is_no_larger_than_short_sequences_need():
    plan = prefill.plan(prefill_config(16), 300, 2, 5, Gpu.of(90))
    slots = 2 * 384  # five pages of 64, rounded up to tiles of 128
    assert {b.name: b.shape for b in plan.workspace} == {
        "keys": (16, slots, 128), "values": (16, slots, 128), "keys_pe": (slots, 64), "used": (1,)
    }  # fmt: skip
    assert [k.function for k in plan.kernels] == ["append", "survey", "expand", "attend"]
    one = prefill.plan(prefill_config(16), 1, 64, 5, Gpu.of(90))  # one row cannot be of more than one sequence
    assert one.workspace[0].shape == (16, 384, 128)


@pytest.mark.parametrize("capability", [86, 90])
@pytest.mark.parametrize("weights", ["bfloat16", "float8_e4m3fn", "int8"])
def test_expert_plans_name_only_known_kernels(capability, weights):
    target, config = Gpu.of(capability), experts_config(weights)
    if weights == "float8_e4m3fn" and capability == 86:
        with pytest.raises(PlanError, match="no FP8"):
            experts.kernels(config, target)
        return
    plans = [experts.plan(config, tokens, target) for tokens in TOKENS]
    named = {k for plan in plans for k in plan.kernels}
    assert all(p.workspace_bytes <= experts.workspace_bytes(config, TOKENS[-1], target) for p in plans)
    assert named == set(experts.kernels(config, target))


@pytest.mark.parametrize(("capability", "heads"), itertools.product(ARCHITECTURES, [16, 128]))
def test_shares_fill_the_gpu_once(capability, heads):
    target = Gpu.of(capability)
    shares, combine = attention.plan(attention_config(heads), 3, 3, 512, target).launches[1:]
    slots = target.num_sms * TILES[capability]["few" if heads == 16 else "many"].ctas
    assert shares.kernel.function == "attend_shares" and 0.9 * slots <= shares.grid[0] <= slots
    assert combine.grid[1] * dict(combine.kernel.constexprs)["BLOCK_D"] == 512


@pytest.mark.parametrize(("capability", "heads"), itertools.product([89, 90, 120], [6, 16, 128]))
def test_workspace_suffices_for_all_shares(capability, heads):
    """And whoever fills the GPU without shares needs none."""
    target, config, seen = Gpu.of(capability), attention_config(heads), set()
    most = attention.workspace_bytes(config, target)
    for tokens in range(1, 3000, 13):
        for sequences in {1, tokens // 7 + 1, tokens}:
            plan = attention.plan(config, tokens, sequences, 9, target)
            assert plan.workspace_bytes <= most
            seen.add(plan.kernels[1].function)
    assert seen == {"attend", "attend_shares"}


def test_a_single_token_is_not_sorted():
    for weights, config in (("bfloat16", experts_config()), ("float8_e4m3fn", experts_config("float8_e4m3fn", num_experts=1))):
        functions = [k.function for k in experts.plan(config, 1, Gpu.of(90)).kernels if k.function != "quantize"]
        assert functions == ["gate_up", "down", "combine"], weights
    assert experts.plan(experts_config(), 2, Gpu.of(90)).kernels[0].function == "sort"


def test_few_rows_of_int4_experts_take_no_launch_more():
    """They are split in registers; many are put in halves once."""
    functions = [[k.function for k in experts.plan(experts_config("int8"), n, Gpu.of(90)).kernels] for n in (1, 100, 400)]
    rest = ["gate_up", "down", "combine"]
    assert functions == [rest, ["sort", *rest], ["sort", "halve", *rest]]


def test_no_tokens_no_launches():
    target = Gpu.of(90)
    assert not attention.plan(attention_config(16), 0, 3, 4, target).launches
    assert not prefill.plan(prefill_config(16), 0, 3, 4, target).launches
    assert not experts.plan(experts_config(), 0, target).launches
    config = route.Routing(64, "softmax", "greedy", "max", 1, 1, 6, 0, 1.0, False)
    assert not route.plan(config, 0, target).launches


def test_attention_tiles_suffice_for_every_batch_of_a_shape():
    rng = random.Random(0)
    for _ in range(2000):
        rows, sequences, padding = rng.choice((1, 2, 4, 8, 64)), rng.randrange(1, 9), rng.randrange(9)
        new = [rng.choice((0, 1, 1, rng.randrange(40))) for _ in range(sequences)]
        tiles = cdiv(sum(new) + padding + sequences * (rows - 1), rows)
        assert sum(cdiv(n, rows) for n in new) + cdiv(padding, rows) <= tiles
        nonempty = min(sequences, sum(new) + padding)
        assert sum(cdiv(n, rows) for n in new) + cdiv(padding, rows) <= cdiv(sum(new) + padding + nonempty * (rows - 1), rows)


@pytest.mark.parametrize("by_pair", [False, True])
def test_expert_tiles_never_collide(by_pair):
    rng = random.Random(0)
    for _ in range(2000):
        block, counts = rng.choice((16, 64)), [rng.choice((0, 1, rng.randrange(90))) for _ in range(9)]
        begin, free = 0, 0
        for expert, count in enumerate(counts):
            first = begin if by_pair else begin // block + expert
            assert first >= free
            free, begin = first + cdiv(count, block), begin + count
        assert free <= (sum(counts) if by_pair else sum(counts) // block + len(counts))


def test_workspace_buffers_are_aligned_and_apart():
    plan = experts.plan(experts_config("float8_e4m3fn"), 300, Gpu.of(90))
    spans = sorted((b.offset, b.offset + b.size) for b in plan.workspace)
    assert all(start % ALIGNMENT == 0 for start, _ in spans)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
    assert plan.workspace_bytes == spans[-1][1]


def test_arguments_resolve_to_addresses():
    plan = attention.plan(attention_config(16), 4, 4, 64, Gpu.of(90))
    names = {a for launch in plan.launches for a in launch.arguments if isinstance(a, str)}
    addresses = plan.addresses({n: 4096 + i for i, n in enumerate(sorted(names))}, workspace=1 << 20)
    for launch in plan.launches:
        assert len(launch.values(addresses)) == len(launch.kernel.arguments)
        assert all(isinstance(v, (int, float)) for v in launch.values(addresses))
    assert addresses["lse"] == (1 << 20) + plan.workspace[1].offset


def test_a_launch_takes_exactly_its_arguments():
    kernel = attention.kernels(attention_config(16), Gpu.of(90))[0]
    with pytest.raises(PlanError, match="append takes"):
        bind(kernel, (1,), latent="latent")


def test_place():
    assert [b.offset for b in place(("a", "bf16", (3,)), ("b", "fp32", (100,)), ("c", "i32", (1,)))] == [0, 256, 768]


def test_plans_need_neither_torch_nor_triton():
    code = (
        "import sys\nfrom latentrt.plugins import ops\nplans = [ops.part(name, 'plan') for name in ops.NAMES]\n"
        "assert not {'torch', 'triton', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_tiles_of_a_rank_are_those_of_all_experts():
    """A rank sees the rows of all ranks, of which an eighth is for its experts: as many rows an expert as without ranks."""
    target = Gpu.of(90)
    whole, share = experts_config(num_experts=160), replace(experts_config(num_experts=20), total_experts=160)
    for tokens in (1, 2, 40, 300, 3000):
        tiles = [
            dict(kernel.constexprs).get("BLOCK_M")
            for config in (whole, share)
            for kernel in experts.plan(config, tokens, target).kernels
            if kernel.function == "gate_up"
        ]
        assert tiles[0] == tiles[1]
    alone = experts.plan(replace(share, total_experts=0), 300, target).kernels
    assert {k for k in alone if k.function == "gate_up"} != {
        k for k in experts.plan(share, 300, target).kernels if k.function == "gate_up"
    }
