"""The very ONNX file that TensorRT parses, run on ONNX Runtime: bf16 and FP8 graphs against the reference and emulations."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F

from latentrt.export.calibration import Samples, activation_scales
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.lowering.tensorrt import fp8_graph
from latentrt.export.lowering.tensorrt import lowering as tensorrt
from latentrt.export.models.base import Weight, weight_name
from latentrt.export.models.deepseek_v2 import model as deepseek_v2
from latentrt.export.models.deepseek_v2.model import FORMS
from latentrt.export.quantization import BFloat16, BFloat16Int4, Fp8, Fp8Int4
from latentrt.plugins.contract import DOMAIN
from latentrt.validation.stages.on_cpu import runnable
from tests import checkpoints, ragged
from tests.conftest import EXAMPLE
from tests.export.graph_on_cpu import CpuGraph, stored, value

pytestmark = pytest.mark.slow

FORMATS = {"bf16": BFloat16(), "fp8": Fp8(), "static": Fp8(), "fp8-int4": Fp8Int4(64), "bf16-int4": BFloat16Int4(64)}
CASES = [(name, form) for name in FORMATS for form in FORMS]
LENGTHS, SCHEDULE = [200, 64, 1, 119], [[130, 0, 1, 60], [0, 63, 0, 1], [1, 1, 0, 57]]


@pytest.fixture(scope="module")
def example() -> SimpleNamespace:
    """The example model's checkpoint, held-out sequences, and the reference's logits of all their tokens."""
    from tokenizers import Tokenizer

    text = (EXAMPLE / "held_out.txt").read_text()
    ids = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json")).encode(text).ids
    starts = np.cumsum([0, *LENGTHS])
    sequences = [ids[a:b] for a, b in pairwise(starts)]
    model = checkpoints.reference(EXAMPLE)
    logits = torch.cat([checkpoints.reference_logits(model, s) for s in sequences])
    others = tuple(tuple(ids[a : a + 256]) for a in range(1000, 3048, 256))  # calibrated on other tokens than are judged
    scales = activation_scales(Checkpoint(EXAMPLE), Samples(others))
    return SimpleNamespace(checkpoint=Checkpoint(EXAMPLE), sequences=sequences, logits=logits, scales=scales)


@pytest.fixture(scope="module")
def graphs(traced, example, tmp_path_factory) -> dict[tuple[str, str], onnx.ModelProto]:
    """The files as the lowering writes them, read again: by format and form."""
    config, folder, found = example.checkpoint.config, tmp_path_factory.mktemp("graphs"), {}
    for name, form in CASES:
        model, file = traced(config, torch.bfloat16, "bfloat16", 64, form), folder / f"{name}.{form}.onnx"
        scales = example.scales if name == "static" else None
        tensorrt.prepare(model, deepseek_v2.weights(config), FORMATS[name], scales)
        ir.save(model, file)
        found[name, form] = onnx.load(file)
    return found


@pytest.fixture(scope="module")
def logits(graphs, example) -> dict[tuple[str, str], torch.Tensor]:
    """What the graphs answer to the held-out sequences in four ragged steps with shuffled pages and padding rows."""
    found = {}
    for name, form in CASES:
        pages = ragged.Pages(LENGTHS, 64)
        graph = CpuGraph(graphs[name, form], stored(example.checkpoint, FORMATS[name]), pages.num_pages)
        answers = ragged.run(graph.step, example.sequences, SCHEDULE, pages, padding=(3, 0))
        found[name, form] = torch.from_numpy(np.concatenate(answers))
    return found


def divergence(p: torch.Tensor, q: torch.Tensor) -> tuple[float, float]:
    """Mean KL(p, q) of next-token distributions, and the share of tokens with the same first choice."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean()), float((p.argmax(-1) == q.argmax(-1)).float().mean())


def emulation(example, monkeypatch, name: str) -> torch.Tensor:
    """Our own torch model in float32 with the weights of a format, and the inputs of FP8 products rounded.

    Row by row; where static, those of linears (not of experts) by one scale each, beyond which they saturate.
    """
    from latentrt.plugins.moe_experts import reference as experts

    def rounded(x, scale=None):
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 448 if scale is None else scale
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale

    linear = F.linear
    if name in ("fp8", "static"):
        monkeypatch.setattr(experts, "F", SimpleNamespace(silu=F.silu, linear=lambda x, w: linear(rounded(x), w)))
    config, weight_format, static = example.checkpoint.config, FORMATS[name], name == "static"
    decoded, tensors = {}, stored(example.checkpoint, weight_format)
    for weight in deepseek_v2.weights(config):
        names = [weight.name + plan.suffix for plan in weight_format.stored(weight)]
        decoded[weight.name] = weight_format.decode(weight, [tensors[n] for n in names])
    model = deepseek_v2.DeepseekV2Step(config).eval()
    model.load_state_dict({n: decoded[weight_name(n)] for n, _ in model.named_parameters()}, strict=False)
    for path, module in model.named_modules():
        if name != "bf16-int4" and isinstance(module, torch.nn.Linear) and not path.endswith(("lm_head", "mlp.gate")):
            scale = example.scales[f"model.{path}.weight"] if static else None
            module.register_forward_pre_hook(lambda module, inputs, scale=scale: rounded(inputs[0], scale))
    pages = ragged.Pages(LENGTHS, 64)
    answers = ragged.run(ragged.torch_step(model, pages, torch.float32), example.sequences, SCHEDULE, pages)
    return torch.from_numpy(np.concatenate(answers))


@pytest.mark.parametrize("form", FORMS)
def test_bf16_graph_matches_the_reference(form, logits, example):
    kl, same = divergence(example.logits, logits["bf16", form])
    print(f"KL to the reference: bf16 {form} {kl:.2e} (same first choice {same:.3f})")
    assert kl < 1e-3 and same > 0.97, (kl, same)


@pytest.mark.parametrize("name", FORMATS)
def test_both_forms_of_a_graph_are_as_near_to_each_other_as_to_the_reference(name, logits, example):
    """They round in other places; nothing else differs."""
    absorbed, expanded = (logits[name, form] for form in FORMS)
    between, _ = divergence(absorbed, expanded)
    assert 0 < between < 2 * divergence(example.logits, absorbed)[0]


@pytest.mark.parametrize(("name", "form"), CASES[2:])
def test_a_quantized_graph_matches_the_reference_within_what_its_format_explains(name, form, logits, example, monkeypatch):
    kl, same = divergence(example.logits, logits[name, form])
    assert kl < 1e-2 and same > 0.92, (kl, same)
    emulated = emulation(example, monkeypatch, name)
    explained, _ = divergence(example.logits, emulated)
    bf16, _ = divergence(example.logits, logits["bf16", form])
    print(f"KL to the reference: {name} {form} {kl:.2e} (same first choice {same:.3f}), emulation {explained:.2e}")
    assert 0.5 * explained < kl < 1.5 * explained + bf16  # rounding is chaotic: sizes of errors agree, errors do not


def test_one_fp8_linear_is_the_formula():
    """y = (x / row) e4m3 @ W e4m3 * row * channel + bias, with outliers, a row of zeros and rows of very different size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 32, generator=generator) * torch.tensor([1, 1e-3, 1e3, 0, 5, 1])[:, None]
    x[4, 3] = 300.0
    x, weight = x.bfloat16(), Weight("linear.weight", (24, 32), "linear", (("w",),))
    quantized, channel = Fp8().encode(weight, torch.randn(24, 32, generator=generator))
    bias = torch.randn(24, generator=generator).bfloat16()
    model = _linear_model()
    fp8_graph.quantize(model, [weight], Fp8())
    session = ort.InferenceSession(runnable(ir.to_proto(model)).SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"x": x, "linear.weight": quantized, "linear.weight.scale": channel, "bias": bias}
    (y,) = session.run_with_ort_values(["y"], {k: value(v) for k, v in feeds.items()})
    row = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-10) / 448
    product = (x.float() / row).to(torch.float8_e4m3fn).float() @ quantized.float().T
    expected = (product.bfloat16().float() * row * channel + bias.float()).bfloat16()
    torch.testing.assert_close(torch.from_numpy(y.numpy()), expected.float(), rtol=2**-7, atol=1e-6)


def test_one_linear_with_a_static_scale_is_the_formula_and_saturates():
    """x beyond 448 times the scale becomes 448 times the scale."""
    generator, static = torch.Generator().manual_seed(0), 0.01
    x = torch.randn(6, 32, generator=generator) * torch.tensor([1, 1e-3, 100, 0, 5, 1])[:, None]
    x, weight = x.bfloat16(), Weight("linear.weight", (24, 32), "linear", (("w",),))
    assert x.abs().max() > 100 * static * 448 / 4
    quantized, channel = Fp8().encode(weight, torch.randn(24, 32, generator=generator))
    model = _linear_model()
    fp8_graph.quantize(model, [weight], Fp8(), {weight.name: static})
    session = ort.InferenceSession(runnable(ir.to_proto(model)).SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"x": x, "linear.weight": quantized, "linear.weight.scale": channel, "bias": torch.zeros(24).bfloat16()}
    (y,) = session.run_with_ort_values(["y"], {k: value(v) for k, v in feeds.items()})
    product = (x.float() / static).clamp(-448, 448).to(torch.float8_e4m3fn).float() @ quantized.float().T
    expected = (product.bfloat16().float() * static * channel).bfloat16().float()
    torch.testing.assert_close(torch.from_numpy(y.numpy()), expected, rtol=2**-7, atol=1e-6)


def _linear_model() -> ir.Model:
    """x [T, 32] bf16 -> Gemm with a bias -> y [T, 24], cast to float32, which numpy knows."""
    def tensor(name, *shape):
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.BFLOAT16))

    inputs = [tensor("x", "T", 32), tensor("linear.weight", 24, 32), tensor("bias", 24)]
    gemm = ir.node("Gemm", inputs, {"transB": 1}, name="linear", outputs=[tensor("narrow", "T", 24)])
    y = ir.Value(name="y", shape=ir.Shape(["T", 24]), type=ir.TensorType(ir.DataType.FLOAT))
    cast = ir.node("Cast", gemm.outputs, {"to": int(ir.DataType.FLOAT)}, outputs=[y])
    graph = ir.Graph(inputs, [y], nodes=[gemm, cast], opset_imports={"": 23}, name="linear")
    return ir.Model(graph, ir_version=11)


def test_static_activation_scales(traced, example):
    """One constant per linear: no ReduceMax is left, and the scale divides and multiplies."""
    config = example.checkpoint.config
    weights = deepseek_v2.weights(config)
    model = traced(config, torch.bfloat16, "bfloat16", 64)
    scales = {w.name: 0.02 + 0.001 * k for k, w in enumerate(weights) if w.role == "linear"}
    fp8_graph.quantize(model, weights, Fp8(), scales)
    assert not [n for n in model.graph if n.op_type == "ReduceMax"]
    constants = {k: v.const_value.numpy() for k, v in model.graph.initializers.items() if k.endswith(".x_scale")}
    assert {k.removesuffix(".x_scale"): float(v) for k, v in constants.items()} == pytest.approx(scales)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_quantized(form, graphs, example):
    """FP8: linears and experts. bf16: w_uk and w_uv, embedding, norms, head. float32: router logits, scales."""
    graph = graphs["fp8", form].graph
    types = {i.name: i.type.tensor_type.elem_type for i in graph.input}
    for weight in deepseek_v2.weights(example.checkpoint.config):
        quantized = weight.role in ("linear", "gate_up", "down")
        assert types[weight.name] == (onnx.TensorProto.FLOAT8E4M3FN if quantized else onnx.TensorProto.BFLOAT16), weight.name
        assert (f"{weight.name}.scale" in types) == quantized
        assert types.get(f"{weight.name}.scale", onnx.TensorProto.FLOAT) == onnx.TensorProto.FLOAT
    known = {v.name: v.type.tensor_type.elem_type for v in graph.value_info}
    routes = [n for n in graph.node if n.op_type == "MoeRoute"]
    assert routes and all(known[n.input[0]] == onnx.TensorProto.FLOAT for n in routes)


@pytest.mark.parametrize("name", ["fp8-int4", "bf16-int4"])
def test_experts_alone_are_int4(name, graphs, example):
    """All other inputs are those of fp8 or bf16; experts come as bytes, two elements each, with scales of blocks."""
    rest, names = graphs[name.removesuffix("-int4"), "absorbed"].graph, [i.name for i in graphs["fp8", "absorbed"].graph.input]
    found = {i.name: i.type.tensor_type for i in graphs[name, "absorbed"].graph.input}
    experts = [n for n in found if ".experts." in n]
    assert {i.name: i.type.tensor_type for i in rest.input if ".experts." not in i.name} == {
        n: t for n, t in found.items() if n not in experts
    }
    shapes = {n: (found[n].elem_type, [d.dim_value for d in found[n].shape.dim]) for n in experts if ".1." in n}
    layer, byte, real = "model.layers.1.mlp.experts", onnx.TensorProto.INT8, onnx.TensorProto.FLOAT
    assert shapes == {
        f"{layer}.gate_up_proj": (byte, [16, 128, 96]), f"{layer}.down_proj": (byte, [16, 192, 32]),
        f"{layer}.gate_up_proj.scale": (real, [16, 128, 3]), f"{layer}.down_proj.scale": (real, [16, 192, 1]),
    }  # fmt: skip
    assert name == "bf16-int4" or list(found) == names
    nodes = [n for n in graphs[name, "absorbed"].graph.node if n.op_type == "MoeExperts"]
    assert {a.i for n in nodes for a in n.attribute if a.name == "packed"} == {2}


def test_plugin_nodes_are_as_the_parser_wants_them(graphs):
    for (_, form), graph in graphs.items():
        nodes = [n for n in graph.graph.node if n.domain == DOMAIN]
        attention = {"absorbed": "MlaAttention", "expanded": "MlaPrefill"}[form]
        assert {n.op_type for n in nodes} == {attention, "MoeRoute", "MoeExperts"}
        for node in nodes:
            attributes = {a.name: a.s for a in node.attribute}
            assert attributes["plugin_namespace"] == DOMAIN.encode() and attributes["plugin_version"] == b"1"
            assert all(node.input)


def test_fp8_keeps_the_largest_values_and_rows_of_zeros():
    weight = Weight("w", (3, 4), "linear", (("w",),))
    values = torch.tensor([[448.0, -448, 1, 0], [0, 0, 0, 0], [1e30, -1e30, 1e29, 0]])
    quantized, scale = Fp8().encode(weight, values)
    assert torch.isfinite(quantized.float()).all() and scale.shape == (3,)
    torch.testing.assert_close(Fp8().decode(weight, [quantized, scale]), values, rtol=0.0625, atol=0)
