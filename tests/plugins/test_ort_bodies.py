"""The ONNX Runtime bodies of the ops against their plain torch forms, one node at a time."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from latentrt.plugins import cache_formats
from latentrt.plugins.contract import DOMAIN
from latentrt.plugins.mla_attention import op as mla_op
from latentrt.plugins.moe_experts import op as experts_op
from latentrt.plugins.moe_route import op as route_op
from latentrt.plugins.onnx_function import MICROSOFT, bodies
from latentrt.plugins.step_graph import DYNAMIC

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
# float32 on both sides; the order of some dozen to some hundred summands differs
TOLERANCE = 1e-5
_TYPES = {torch.float32: onnx.TensorProto.FLOAT, torch.float16: onnx.TensorProto.FLOAT16, torch.int32: onnx.TensorProto.INT32,
          torch.uint8: onnx.TensorProto.UINT8}  # fmt: skip


def session(contract, tensors, attributes: dict, around=None) -> ort.InferenceSession:
    """A model of one node and its body. `around` may wrap the node: (node) -> nodes, inputs and outputs keeping their names."""
    specs = list(zip(contract.inputs, tensors, strict=True))
    inputs = [
        helper.make_tensor_value_info(s.name, _TYPES[t.dtype], _dims(s, t)) for s, t in specs if t is not None
    ]  # fmt: skip
    outputs = [helper.make_empty_tensor_value_info(o.name) for o in contract.outputs]
    node = helper.make_node(
        contract.onnx_type, [s.name if t is not None else "" for s, t in specs], [o.name for o in contract.outputs],
        domain=DOMAIN, **attributes,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(helper.make_graph([node], "one", inputs, outputs), opset_imports=opsets, ir_version=11)
    model.functions.extend(bodies(model))
    if around:
        del model.graph.node[:]
        model.graph.node.extend(around(node))
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _dims(spec, tensor) -> list[int | str]:
    """As in a step graph: only sizes that a step can change are not fixed."""
    names = spec.dims_of(tensor.dim())
    return [n if n.split()[0] in DYNAMIC else size for n, size in zip(names, tensor.shape, strict=True)]


def run(contract, tensors, attributes: dict, around=None) -> list[torch.Tensor]:
    feeds = {s.name: t.numpy() for s, t in zip(contract.inputs, tensors, strict=True) if t is not None}
    return [torch.from_numpy(y) for y in session(contract, tensors, attributes, around).run(None, feeds)]


def int32(values):
    return torch.tensor(list(values), dtype=torch.int32)


def attention_inputs(
    sequences, page_size, heads, padding, seed, cache_format="float32", rank=6, rope=4
) -> list[torch.Tensor]:  # fmt: skip
    """Shuffled pages, NaN in cells that are not cached, stray table entries that point to a page of NaN."""
    g = torch.Generator().manual_seed(seed)
    layout, rows = cache_formats.get(cache_format), sum(new for _, new in sequences)
    counts = [-(-(past + new) // page_size) for past, new in sequences]
    free = (1 + torch.randperm(sum(counts), generator=g)).tolist()
    last = sum(counts) + 1
    nothing = float("nan") if layout.dtype.is_floating_point else -1  # a packed format's scales are NaN then
    cache = torch.full((last + 1, page_size, layout.width(rank, rope)), nothing, dtype=layout.dtype)
    table = torch.full((len(sequences), max(counts) + 1), last, dtype=torch.int32)
    for b, (past, _) in enumerate(sequences):
        table[b, : counts[b]] = int32(free.pop() for _ in range(counts[b]))
        for p in range(past):
            token = torch.randn(rank + rope, generator=g)
            cache[table[b, p // page_size], p % page_size] = layout.encode(token[None, :rank], token[None, rank:])[0]
    shapes = (rows + padding, heads, rank), (rows + padding, heads, rope), (rows + padding, rank), (rows + padding, rope)
    starts = np.cumsum([0, *(new for _, new in sequences)])
    return [
        *(torch.randn(s, generator=g) for s in shapes), cache, table, int32(past for past, _ in sequences),
        int32(starts), int32([rows]),
    ]  # fmt: skip


SEQUENCES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=4)


@SETTINGS
@given(SEQUENCES, st.integers(1, 4), st.sampled_from([1, 2, 5]), st.integers(0, 3), st.integers(0, 99), st.booleans())
def test_mla_attention(sequences, page_size, heads, padding, seed, half):
    attributes = {"softmax_scale": 0.3, "cache_format": "float16" if half else "float32"}
    tensors = attention_inputs(sequences, page_size, heads, padding, seed, attributes["cache_format"])
    attended, cache = mla_op.mla_attention(*tensors, *attributes.values())
    found = run(mla_op.CONTRACT, tensors, attributes)
    torch.testing.assert_close(found[0], attended, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found[1][1:], cache[1:], rtol=0, atol=0, equal_nan=True)


PACKED_SIZES = st.sampled_from([(32, 8), (64, 64), (96, 8), (160, 16)])


@SETTINGS
@given(st.sampled_from(cache_formats.PACKED), PACKED_SIZES, SEQUENCES, st.integers(1, 4), st.sampled_from([1, 2, 5]),
       st.integers(0, 3), st.integers(0, 99))  # fmt: skip
def test_mla_attention_over_a_packed_cache(name, sizes, sequences, page_size, heads, padding, seed):
    """The words of the cache are the reference's; what is decoded is the same, so that attention differs by sums alone."""
    tensors = attention_inputs(sequences, page_size, heads, padding, seed, name, *sizes)
    attributes = {"softmax_scale": 0.1, "cache_format": name}
    attended, cache = mla_op.mla_attention(*tensors, *attributes.values())
    found = run(mla_op.CONTRACT, tensors, attributes)
    torch.testing.assert_close(found[0], attended, rtol=0, atol=TOLERANCE)  # measured 4e-6
    assert torch.equal(found[1][1:], cache[1:])


def test_mla_attention_survives_extreme_scores():
    """Scores of +-10^4: softmax must subtract the maximum, and the mask must lie below any score."""
    tensors = attention_inputs([(3, 4)], 2, 2, 0, 1)
    tensors[0], tensors[2] = tensors[0] * 100, tensors[2] * 100
    attributes = {"softmax_scale": 3.0, "cache_format": "float32"}
    attended, _ = mla_op.mla_attention(*tensors, *attributes.values())
    found, _ = run(mla_op.CONTRACT, tensors, attributes)
    torch.testing.assert_close(found, attended, rtol=1e-4, atol=1e-2)  # scores of 1e5 round by 1e-2: weights by 1 %


@pytest.mark.parametrize("name", ["float32", "float16", "int6"])
def test_mla_attention_writes_in_place(name):
    """Bound to one buffer for input and output, the cache is not copied: every cell that is not new keeps its bits."""
    tensors = attention_inputs([(5, 2), (0, 3)], 2, 2, 0, 3, name, 32, 8)
    attributes = {"softmax_scale": 0.3, "cache_format": name}
    _, expected = mla_op.mla_attention(*tensors, *attributes.values())
    engine = session(mla_op.CONTRACT, tensors, attributes)
    binding = engine.io_binding()
    buffer = tensors[4].numpy().copy()
    value = ort.OrtValue.ortvalue_from_numpy(buffer)
    for spec, tensor in zip(mla_op.CONTRACT.inputs, tensors, strict=True):
        if spec.name == "cache":
            binding.bind_ortvalue_input("cache", value)
        else:
            binding.bind_cpu_input(spec.name, tensor.numpy())
    binding.bind_output("attended", "cpu")
    binding.bind_ortvalue_output("cache_out", value)
    engine.run_with_iobinding(binding)
    assert value.data_ptr() == buffer.ctypes.data
    np.testing.assert_array_equal(buffer, expected.numpy())


@st.composite
def routings(draw):
    n_group, size = draw(st.sampled_from([(1, 7), (2, 3), (4, 2), (3, 4)]))
    two = [] if size < 2 else ["top2_sum"]
    return {
        "scoring_func": draw(st.sampled_from(["softmax", "sigmoid"])),
        "topk_method": draw(st.sampled_from(["greedy", "group_limited_greedy"])),
        "group_score": draw(st.sampled_from(["max", *two])), "n_group": n_group, "topk_group": draw(st.integers(1, n_group)),
        "top_k": draw(st.integers(1, n_group * size)), "norm_topk_prob": draw(st.integers(0, 1)),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 16.0])),
    }, n_group * size, draw(st.integers(0, 99)), draw(st.integers(0, 6)), draw(st.booleans())  # fmt: skip


@SETTINGS
@given(routings())
def test_moe_route(case):
    """Ties included: logits come in steps of 1/2, so that many are equal. Padding rows: ids -1, weights 0."""
    attributes, experts, seed, count, tied = case
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(-6, 7, (6, experts), generator=g) / 2 if tied else torch.randn(6, experts, generator=g) * 3
    tensors = [logits, int32([count]), None]
    ids, weights = route_op.moe_route(*tensors, *attributes.values())
    found = run(route_op.CONTRACT, tensors, attributes)
    torch.testing.assert_close(found[1], weights, rtol=TOLERANCE, atol=1e-7)
    # Softmax of equal logits is equal in each code; group sums of two may round apart, then the tie is decided otherwise.
    if not (tied and attributes["group_score"] == "top2_sum"):
        assert torch.equal(found[0], ids)


def interleaved(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, 1)
    return torch.stack([gate, up], 2).flatten(1, 2)


def experts_inputs(g, tokens, experts, top_k, hidden=16, inner=16) -> list:
    """ids without repetition, as routing makes them; some rows are padding (-1) and some weights are 0."""
    ids = torch.stack([torch.randperm(experts, generator=g)[:top_k] for _ in range(tokens)]).int().reshape(tokens, top_k)
    weights = torch.rand(tokens, top_k, generator=g) * 4
    weights[torch.rand(tokens, top_k, generator=g) < 0.1] = 0
    padding = torch.rand(tokens, generator=g) < 0.2
    ids[padding], weights[padding] = -1, 0
    gate_up = torch.randn(experts, 2 * inner, hidden, generator=g) / 4
    return [
        torch.randn(tokens, hidden, generator=g),
        ids,
        weights,
        gate_up,
        torch.randn(experts, hidden, inner, generator=g) / 4,
    ]


def both_intermediate(node):
    """x comes from a node and y goes to a node, and no one else reads x: where ONNX Runtime's MoE once gave garbage."""
    x, y = node.input[0], node.output[0]
    node.input[0], node.output[0] = "x_inside", "y_inside"
    return [helper.make_node("Neg", [x], ["x_inside"]), node, helper.make_node("Neg", ["y_inside"], [y])]


@SETTINGS
@given(st.integers(1, 9), st.integers(2, 7), st.data())
def test_moe_experts(tokens, experts, data):
    top_k = data.draw(st.integers(1, experts))
    first = data.draw(st.integers(0, 1))
    last = data.draw(st.integers(first + 1, experts))
    tensors = experts_inputs(torch.Generator().manual_seed(data.draw(st.integers(0, 99))), tokens, experts, top_k)
    tensors[3], tensors[4] = tensors[3][first:last], tensors[4][first:last]  # a slice: ids outside it add nothing
    expected = experts_op.moe_experts(*tensors, None, None, first, "concatenated")
    tensors[3] = interleaved(tensors[3])
    attributes = {"first_expert": first, "gate_up_layout": "interleaved"}
    (found,) = run(experts_op.CONTRACT, [*tensors, None, None], attributes)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=TOLERANCE * 10)  # weights up to 4, k up to 7: sums of size 30


@pytest.mark.parametrize("block", [None, 0, 16])
def test_moe_experts_between_other_nodes(block):
    g = torch.Generator().manual_seed(5)
    tensors = experts_inputs(g, 8, 6, 3, hidden=32, inner=32)
    scales = [None, None]
    attributes = {"first_expert": 0, "gate_up_layout": "interleaved"}
    tensors[3] = interleaved(tensors[3])
    if block is not None:
        blocks = (32 // block,) if block else ()
        for k in (3, 4):
            scales[k - 3] = torch.rand(*tensors[k].shape[:2], *blocks, generator=g) / 200
            tensors[k] = torch.randint(1, 256, tensors[k].shape, generator=g).to(torch.uint8)
    expected = -experts_op.moe_experts(-tensors[0], *tensors[1:], *scales, 0, "interleaved")
    (found,) = run(experts_op.CONTRACT, [*tensors, *scales], attributes, both_intermediate)
    # block-wise weights make the kernel round activations to int8 (2e-2); else float32 sums of size 30
    torch.testing.assert_close(found, expected, rtol=2e-2 if block else 1e-5, atol=0.3 if block else 1e-4)


@SETTINGS
@given(st.integers(1, 9), st.sampled_from([0, 16, 32]), st.integers(0, 99))
def test_moe_experts_of_four_bits(tokens, block, seed):
    """Random bytes, each two elements, and scales of both signs: float32 sums, in blocks too."""
    g = torch.Generator().manual_seed(seed)
    tensors, scales = experts_inputs(g, tokens, 5, 2, hidden=64, inner=32), []
    for k in (3, 4):
        inputs = tensors[k].shape[2]
        blocks = (inputs // block,) if block else ()
        octets = (5, 64, inputs // 2)
        tensors[k] = torch.randint(0, 256, octets, generator=g).to(torch.uint8)
        scales.append(torch.randn(*octets[:2], *blocks, generator=g) / 20)
    expected = experts_op.moe_experts(*tensors, *scales, 0, "interleaved", 2)
    attributes = {"first_expert": 0, "gate_up_layout": "interleaved", "packed": 2}
    (found,) = run(experts_op.CONTRACT, [*tensors, *scales], attributes)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("quantized", [0, 1, 2], ids=["float", "8 bits", "4 bits"])
def test_moe_experts_computes_chosen_experts_only(quantized):
    """Experts that no row chose are full of NaN; a padding row chooses none."""
    g = torch.Generator().manual_seed(7)
    tensors = experts_inputs(g, 3, 8, 2)
    tensors[1], tensors[2] = int32([5, 2, 2, 6, -1, -1]).reshape(3, 2), torch.tensor([[1.0, 2.0], [0.5, 3.0], [0.0, 0.0]])
    tensors[3] = interleaved(tensors[3])
    scales = [None, None]
    poisoned = [0, 1, 3, 4, 7]
    if quantized:
        for k in (3, 4):
            scales[k - 3] = torch.rand(tensors[k].shape[:2], generator=g) / 200
            scales[k - 3][poisoned] = float("nan")
            octets = (*tensors[k].shape[:2], tensors[k].shape[2] // quantized)
            tensors[k] = torch.randint(1, 256, octets, generator=g).to(torch.uint8)
    else:
        tensors[3][poisoned], tensors[4][poisoned] = float("nan"), float("nan")
    attributes = {"first_expert": 0, "gate_up_layout": "interleaved", "packed": max(1, quantized)}
    (found,) = run(experts_op.CONTRACT, [*tensors, *scales], attributes)
    expected = experts_op.moe_experts(*tensors, *scales, *attributes.values())
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("quantized", [False, True])
def test_moe_experts_padding_rows_are_zero(quantized):
    g = torch.Generator().manual_seed(8)
    tensors = experts_inputs(g, 4, 5, 2)
    tensors[1][0], tensors[2][0] = int32([4, 1]), 1.0
    tensors[1][1:3], tensors[2][1:3] = -1, 0
    tensors[3] = interleaved(tensors[3])
    scales = [None, None]
    if quantized:
        scales = [torch.rand(t.shape[:2], generator=g) for t in tensors[3:5]]
        tensors[3:5] = [torch.randint(1, 256, t.shape, generator=g).to(torch.uint8) for t in tensors[3:5]]
    attributes = {"first_expert": 0, "gate_up_layout": "interleaved"}
    (found,) = run(experts_op.CONTRACT, [*tensors, *scales], attributes)
    assert (found[1:3] == 0).all() and (found[0] != 0).any()
