"""Op contracts: errors, fakes, the mutating twin, PyTorch's own checks of custom ops, and the ONNX schemas."""

import onnx
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from latentrt.plugins import trt_base
from latentrt.plugins.contract import DOMAIN, AttributeSpec, ContractError, OpContract, OutputSpec, TensorSpec
from latentrt.plugins.ops import contracts

OPS = {c.name: c for c in contracts().values() if not c.collective}  # those: test_collectives.py
ops = torch.ops.latentrt


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def mla_inputs(dtype=torch.float32, cache_dtype=torch.float32) -> dict:
    """Two sequences: 2 new tokens after 3, 1 new after 0; one padding row; page size 2."""
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    return {
        "q_latent": random(4, 3, 6), "q_pe": random(4, 3, 2), "latent": random(4, 6), "k_pe": random(4, 2),
        "cache": torch.randn(6, 2, 8, generator=g).to(cache_dtype),
        "block_table": torch.tensor([[4, 2, 5], [1, 5, 5]], dtype=torch.int32), "cached_lengths": int32(3, 0),
        "query_starts": int32(0, 2, 3), "num_tokens": int32(3), "softmax_scale": 0.5, "cache_format": "float32",
    }  # fmt: skip


def prefill_inputs(dtype=torch.float32) -> dict:
    """The batch of `mla_inputs`, queries 5 wide and values 7."""
    g = torch.Generator().manual_seed(3)
    q_nope, w_uk, w_uv = (torch.randn(s, generator=g).to(dtype) for s in ((4, 3, 5), (3, 5, 6), (3, 6, 7)))
    inputs = mla_inputs(dtype)
    rows = {k: inputs.pop(k) for k in ("q_latent", "q_pe", "latent", "k_pe")}
    return {"q_nope": q_nope, **dict(list(rows.items())[1:]), "w_uk": w_uk, "w_uv": w_uv, **inputs}


def route_inputs() -> dict:
    return {
        "router_logits": torch.randn(5, 6, generator=torch.Generator().manual_seed(1)), "num_tokens": int32(4),
        "correction_bias": None, "scoring_func": "softmax", "topk_method": "group_limited_greedy", "group_score": "max",
        "n_group": 3, "topk_group": 2, "top_k": 2, "norm_topk_prob": 0, "routed_scaling_factor": 2.5,
    }  # fmt: skip


def experts_inputs(dtype=torch.float32) -> dict:
    g = torch.Generator().manual_seed(2)
    return {
        "x": torch.randn(3, 8, generator=g).to(dtype), "topk_ids": torch.tensor([[0, 3], [2, 1], [-1, -1]], dtype=torch.int32),
        "topk_weights": torch.rand(3, 2, generator=g), "gate_up_proj": torch.randn(4, 10, 8, generator=g).to(dtype),
        "down_proj": torch.randn(4, 8, 5, generator=g).to(dtype), "gate_up_scale": None, "down_scale": None,
        "first_expert": 0, "gate_up_layout": "concatenated", "packed": 1, "total_experts": 0,
    }  # fmt: skip


INPUTS = {"mla_attention": mla_inputs, "mla_prefill": prefill_inputs, "moe_route": route_inputs, "moe_experts": experts_inputs}


def refuses(name: str, changes: dict, *words: str) -> None:
    arguments = INPUTS[name]() | changes
    with pytest.raises(ContractError) as error:
        getattr(ops, name)(*arguments.values())
    for word in (name, *words):
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


@pytest.mark.parametrize(("name", "changes", "words"), [
    ("mla_attention", {"latent": torch.zeros(4, 3, 6)}, ["latent", "(4, 3, 6)", "T", "kv_lora_rank"]),
    ("mla_attention", {"latent": torch.zeros(4, 5)}, ["latent", "(4, 5)", "axis 1", "kv_lora_rank", "6"]),
    ("mla_attention", {"q_pe": torch.zeros(4, 2, 2)}, ["q_pe", "(4, 2, 2)", "axis 1", "H", "3"]),
    ("mla_attention", {"k_pe": torch.zeros(3, 2)}, ["k_pe", "(3, 2)", "axis 0", "T", "4"]),
    ("mla_attention", {"query_starts": int32(0, 3)}, ["query_starts", "(2,)", "B + 1", "3"]),
    ("mla_attention", {"num_tokens": int32(3, 3)}, ["num_tokens", "(2,)", "1"]),
    ("mla_attention", {"cached_lengths": torch.tensor([3, 0])}, ["cached_lengths", "torch.int64", "torch.int32"]),
    ("mla_attention", {"q_latent": torch.zeros(4, 3, 6, dtype=torch.float64)}, ["q_latent", "torch.float64", "torch.float32"]),
    ("mla_attention", {"cache": torch.zeros(6, 2, 8, dtype=torch.int8)}, ["cache", "torch.int8", "torch.float16"]),
    ("mla_attention", {"cache_format": "int5"}, ["cache_format", "'int5'", "'float32'", "'bfloat16'"]),
    ("mla_attention", {"cache": torch.zeros(6, 2, 9)}, ["cache", "(6, 2, 9)", "8"]),
    ("mla_attention", {"cache_format": "float16"}, ["cache", "torch.float32", "float16"]),
    ("mla_prefill", {"w_uk": torch.zeros(3, 5, 7)}, ["w_uk", "(3, 5, 7)", "axis 2", "kv_lora_rank", "6"]),
    ("mla_prefill", {"w_uv": torch.zeros(2, 6, 7)}, ["w_uv", "(2, 6, 7)", "axis 0", "H", "3"]),
    ("mla_prefill", {"q_nope": torch.zeros(4, 3, 6)}, ["axis 1 (qk_nope_head_dim)", "6"]),
    ("mla_prefill", {"cache": torch.zeros(6, 2, 9)}, ["cache", "(6, 2, 9)", "8"]),
    ("moe_route", {"router_logits": torch.zeros(5, 6, dtype=torch.bfloat16)}, ["router_logits", "bfloat16", "float32"]),
    ("moe_route", {"correction_bias": torch.zeros(7)}, ["correction_bias", "(7,)", "E", "6"]),
    ("moe_route", {"scoring_func": "relu"}, ["scoring_func", "'relu'", "'softmax'", "'sigmoid'"]),
    ("moe_route", {"topk_method": "noaux_tc"}, ["topk_method", "'noaux_tc'", "'group_limited_greedy'"]),
    ("moe_route", {"group_score": "sum"}, ["group_score", "'sum'", "'max'", "'top2_sum'"]),
    ("moe_route", {"norm_topk_prob": 2}, ["norm_topk_prob", "2", "0, 1"]),
    ("moe_experts", {"topk_weights": torch.zeros(3, 3)}, ["topk_weights", "(3, 3)", "axis 1", "top_k", "2"]),
    ("moe_experts", {"down_proj": torch.zeros(3, 8, 5)}, ["down_proj", "(3, 8, 5)", "axis 0", "E", "4"]),
    ("moe_experts", {"gate_up_layout": "stacked"}, ["gate_up_layout", "'stacked'", "'interleaved'"]),
    ("moe_experts", {"topk_ids": torch.zeros(3, 2, dtype=torch.int64)}, ["topk_ids", "int64", "int32"]),
    ("moe_experts", {"gate_up_proj": torch.zeros(4, 9, 8)}, ["gate_up_proj", "axis 1", "2 * moe_intermediate_size", "10"]),
    ("moe_experts", {"gate_up_scale": torch.zeros(4)}, ["gate_up_scale", "(4,)", "gate_up_blocks?"]),
    ("moe_experts", {"gate_up_scale": torch.zeros(4, 10, 2, 1)}, ["gate_up_scale", "(4, 10, 2, 1)", "gate_up_blocks?"]),
    ("moe_experts", {"gate_up_scale": torch.zeros(4, 9, 2)}, ["gate_up_scale", "axis 1", "2 * moe_intermediate_size", "10"]),
    ("moe_experts", {"gate_up_scale": torch.zeros(4, 10, 3)}, ["gate_up_scale", "(4, 10, 3)", "8 inputs", "multiple"]),
    ("moe_experts", {"down_scale": torch.zeros(4, 8, 2)}, ["down_scale", "(4, 8, 2)", "5 inputs", "multiple"]),
    ("moe_experts", {"down_scale": torch.zeros(4, 8, 0)}, ["down_scale", "(4, 8, 0)", "5 inputs", "multiple"]),
    ("moe_experts", {"packed": 3}, ["packed", "3", "1, 2"]),
    ("moe_experts", {"packed": 2}, ["gate_up_proj", "(4, 10, 8)", "axis 2", "hidden_size", "8"]),
    ("moe_experts", {"packed": 2, "gate_up_proj": torch.zeros(4, 12, 4), "down_proj": torch.zeros(4, 8, 3)},
     ["packed", "uint8", "float32"]),
    ("moe_experts", {"gate_up_proj": torch.zeros(4, 10, 8).to(torch.int8), "down_proj": torch.zeros(4, 8, 5).to(torch.int8)},
     ["packed is 1", "int8", "2 for int8"]),
])  # fmt: skip
def test_refused_by_name(name, changes, words):
    refuses(name, changes, *words)


@pytest.mark.parametrize("name", OPS)
def test_required_input(name):
    contract, arguments = OPS[name], INPUTS[name]()
    tensors = [None, *list(arguments.values())[1 : len(contract.inputs)]]
    attributes = {a.name: arguments[a.name] for a in contract.attributes}
    with pytest.raises(ContractError, match=f"{name}: input {contract.inputs[0].name} is required"):
        contract.bind(tensors, attributes)


def test_sums_and_products_of_dimensions():
    """A dimension may be bound by a name that comes later in the list than the sum that uses it."""
    spec = (TensorSpec("a", ("B + 1", "2 * N"), (torch.float32,)), TensorSpec("b", ("B", "N"), (torch.float32,)))
    contract = OpContract("sums", "Sums", spec, (OutputSpec("c", ("B", "k"), like="a"),), (AttributeSpec("k", int),))
    assert contract.bind([torch.zeros(4, 6), torch.zeros(3, 3)], {"k": 5}) == {"B": 3, "N": 3}
    assert contract.fake([torch.zeros(4, 6), torch.zeros(3, 3)], {"k": 5})[0].shape == (3, 5)
    for wrong in (torch.zeros(4, 3), torch.zeros(3, 4)):
        with pytest.raises(ContractError):
            contract.bind([torch.zeros(4, 6), wrong], {"k": 5})


def test_a_last_dimension_that_may_be_absent():
    """[E, outputs] and [E, outputs, blocks]; the outputs know nothing of it."""
    contract, arguments = OPS["moe_experts"], experts_inputs()
    arguments |= {k: arguments[k].to(torch.uint8) for k in ("gate_up_proj", "down_proj")}
    attributes = {a.name: arguments[a.name] for a in contract.attributes}
    channels = {"T": 3, "hidden_size": 8, "top_k": 2, "E": 4, "moe_intermediate_size": 5}
    for blocks, sizes in (((), {}), ((4,), {"gate_up_blocks": 4, "down_blocks": 5})):
        scales = {"gate_up_scale": torch.ones(4, 10, *blocks), "down_scale": torch.ones(4, 8, *(5 for _ in blocks))}
        tensors = list((arguments | scales).values())[: len(contract.inputs)]
        assert contract.bind(tensors, attributes) == channels | sizes
        assert contract.fake(tensors, attributes)[0].shape == (3, 8)
        assert trt_base.sizes(contract, [t.shape for t in tensors]) == channels | sizes


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_fake_equals_real(name, rows):
    """Shapes, dtypes and devices of the outputs under FakeTensorMode are the real ones, for no rows too."""
    arguments = INPUTS[name]()
    if name.startswith("mla_"):
        starts = min(rows, 2)
        arguments |= {k: arguments[k][:rows] for k in ("q_latent", "q_nope", "q_pe", "latent", "k_pe") if k in arguments}
        arguments |= {"query_starts": int32(0, starts, starts), "num_tokens": int32(starts)}
    else:
        rowwise = ("router_logits",) if name == "moe_route" else ("x", "topk_ids", "topk_weights")
        arguments |= {k: arguments[k][:rows] for k in rowwise}
    op = getattr(ops, name)
    real = op(*arguments.values())
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments.values()]
        fake = op(*fakes)
    real, fake = (r if isinstance(r, (tuple, list)) else [r] for r in (real, fake))
    assert [(r.shape, r.dtype, r.device) for r in real] == [(f.shape, f.dtype, f.device) for f in fake]
    assert len(real) == len(OPS[name].outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_take_the_dtype_of_their_input(dtype):
    attended, cache = ops.mla_attention(*mla_inputs(dtype).values())
    assert attended.dtype == dtype and cache.dtype == torch.float32
    attended, cache = ops.mla_prefill(*prefill_inputs(dtype).values())
    assert attended.dtype == dtype and attended.shape == (4, 3, 7) and cache.dtype == torch.float32
    assert ops.moe_experts(*experts_inputs(dtype).values()).dtype == dtype


@pytest.mark.parametrize("name", ["mla_attention", "mla_prefill"])
def test_functional_op_writes_nothing_and_shares_nothing(name):
    arguments = INPUTS[name]()
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    outputs = getattr(ops, name)(*arguments.values())
    assert all(torch.equal(arguments[k], v) for k, v in before.items())
    pointers = {v.untyped_storage().data_ptr() for v in arguments.values() if isinstance(v, torch.Tensor)}
    assert all(o.untyped_storage().data_ptr() not in pointers for o in outputs)


@pytest.mark.parametrize("cache_format", ["float32", "float16", "bfloat16"])
def test_mutating_twin_equals_functional(cache_format):
    arguments = mla_inputs(cache_dtype=getattr(torch, cache_format)) | {"cache_format": cache_format}
    attended, cache_out = ops.mla_attention(*arguments.values())
    place = arguments["cache"].data_ptr()
    twin = ops.mla_attention_(*arguments.values())
    assert torch.equal(twin, attended) and torch.equal(arguments["cache"], cache_out)
    assert arguments["cache"].data_ptr() == place


def test_mutating_twin_of_prefill_equals_functional():
    arguments = prefill_inputs()
    attended, cache_out = ops.mla_prefill(*arguments.values())
    twin = ops.mla_prefill_(*arguments.values())
    assert torch.equal(twin, attended) and torch.equal(arguments["cache"], cache_out)


def test_mutating_twin_writes_through_a_view():
    """A cache that is a strided view of something larger: cells of the view are written, the rest is not."""
    arguments = mla_inputs()
    large = torch.full((6, 2, 16), 7.0)
    large[..., ::2] = arguments["cache"]
    attended, cache_out = ops.mla_attention(*arguments.values())
    twin = ops.mla_attention_(*(arguments | {"cache": large[..., ::2]}).values())
    assert torch.equal(twin, attended) and torch.equal(large[..., ::2], cache_out) and (large[..., 1::2] == 7).all()


@pytest.mark.parametrize("name", ["mla_attention", "mla_attention_", "mla_prefill", "mla_prefill_", "moe_route", "moe_experts"])
def test_pytorch_opcheck(name):
    """Schema (what is mutated and aliased), fake registration, and tracing with AOT dispatch, checked by PyTorch itself."""
    arguments = INPUTS[name.removesuffix("_")]()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(ops, name).default, tuple(arguments.values()), test_utils=checks)


def test_block_scales_pass_pytorchs_checks():
    arguments = experts_inputs() | {"gate_up_scale": torch.rand(4, 10, 2), "down_scale": torch.rand(4, 8, 5)}
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.moe_experts.default, tuple(arguments.values()), test_utils=checks)


@pytest.mark.parametrize("contract", OPS.values(), ids=OPS)
def test_onnx_schema(contract):
    schema = onnx.defs.get_schema(contract.onnx_type, domain=DOMAIN)
    assert [i.name for i in schema.inputs] == [s.name for s in contract.inputs]
    assert [o.name for o in schema.outputs] == [o.name for o in contract.outputs]
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    assert [i.option == optional for i in schema.inputs] == [s.optional for s in contract.inputs]
    assert set(schema.attributes) == {a.name for a in contract.attributes}
    assert {n for n, a in schema.attributes.items() if a.required} == {a.name for a in contract.attributes if a.default is None}
