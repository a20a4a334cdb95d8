"""int4: encoding against a formula in float64, the search against the usual scale, packing against ONNX Runtime's kernels."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from latentrt.export import quantization
from latentrt.export.models.base import Weight
from latentrt.export.quantization import Int4
from latentrt.export.quantization.int4 import GRID, pack, unpack
from latentrt.plugins.onnx_function import MICROSOFT

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


def codes_of(packed: np.ndarray) -> np.ndarray:
    """[..., n] bytes -> [..., 2 n] codes from -8 to 7, the low half of a byte first."""
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.int64)
    codes[..., 0::2], codes[..., 1::2] = packed.astype(np.int64) % 16, packed.astype(np.int64) // 16
    return codes - 8


def best_error(block: np.ndarray) -> float:
    """The smallest sum of squared errors that a scale of the grid gives, after least squares. [n] float64"""
    largest = block[np.abs(block).argmax()]
    if largest == 0:
        return 0.0
    errors = []
    for code in GRID:
        codes = np.clip(np.round(block * code / largest), -8, 7)
        scale = (block @ codes) / (codes @ codes)
        errors.append(((block - scale * codes) ** 2).sum())
    return min(errors)


@st.composite
def blocks_of_values(draw):
    g = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 150))
    values = torch.randn(shape, generator=g) ** draw(st.sampled_from([1, 3])) * draw(st.sampled_from([1, 1e-30, 1e-4, 1e30]))
    values[torch.rand(shape, generator=g) < draw(st.sampled_from([0, 0.9]))] = 0
    return values.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


@SETTINGS
@given(blocks_of_values(), st.sampled_from([16, 32, 64, 128]))
def test_the_search_finds_the_best_of_the_grid_and_is_never_worse_than_absmax(values, size):
    weight = Weight("w", tuple(values.shape), "linear", (("w",),))
    packed, scale = (t.numpy() for t in Int4(size).encode(weight, values))
    assert [packed.shape, scale.shape] == [s.shape for s in Int4(size).stored(weight)]
    codes = codes_of(packed)  # [out, blocks, size], where size may be smaller for few inputs
    plain = np.zeros(codes.shape)
    plain.reshape(len(values), -1)[:, : values.shape[1]] = values.double().numpy()
    restored = codes * scale.astype(np.float64)[..., None]
    decoded = Int4(size).decode(weight, [torch.from_numpy(packed), torch.from_numpy(scale)])
    np.testing.assert_allclose(decoded.numpy(), restored.reshape(len(values), -1)[:, : values.shape[1]], rtol=1e-6)
    assert (restored.reshape(len(values), -1)[:, values.shape[1] :] == 0).all() and (scale != 0).all()
    found = ((plain - restored) ** 2).sum(-1)
    best = np.array([[best_error(block) for block in row] for row in plain])
    squares = (plain**2).sum(-1)
    assert (found <= 1.1 * best + 1e-5 * squares).all()  # in float32, halves may round to the other side
    step = np.abs(plain).max(-1, keepdims=True) / 7
    usual = np.round(plain / np.where(step > 0, step, 1)) * step
    assert (found <= ((plain - usual) ** 2).sum(-1) + 1e-5 * squares).all()


def test_two_codes_to_a_byte_the_first_in_the_low_half():
    codes = torch.arange(16, dtype=torch.uint8)
    assert pack(codes).tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert unpack(pack(codes)).equal(codes)


@pytest.mark.parametrize("weight_format", [Int4(), Int4(32), Int4(16, {"gate_up": 4, "gate_proj": 8})], ids=lambda f: f.key)
def test_a_description_restores_the_format(weight_format):
    description = weight_format.description()
    found = quantization.restore(description)
    assert found.key == weight_format.key and found.description() == description
    with pytest.raises(ValueError, match="int4 is described as"):
        quantization.restore(description | {"zero_point": 8})


@pytest.mark.parametrize("role", ["linear", "head", "absorbed", "gate_up", "down", "norm"])
def test_every_role_comes_back(role):
    """4 bits: the searched scale is off by 30 % of a block's largest element at most; 8 bits: by half of 1/127."""
    shape = {"norm": (7,), "linear": (5, 37), "head": (5, 37), "absorbed": (3, 37, 5)}.get(role, (3, 8, 96))
    weight, four = Weight("w", shape, role, (("w",),)), Int4(32)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    encoded = four.encode(weight, values)
    assert [(tuple(e.shape), e.dtype) for e in encoded] == [(s.shape, s.dtype) for s in four.stored(weight)]
    bound = {"norm": 0, "head": 0.5001 / 127, "absorbed": 0.5001 / 127}.get(role, 0.3)
    assert (four.decode(weight, encoded) - values).abs().max() <= bound * values.abs().max()


@pytest.mark.parametrize(("name", "bits"), [
    ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", 8), ("model.layers.3.self_attn.q_proj.weight", 4),
    ("model.layers.0.mlp.down_proj.weight", 8), ("model.layers.3.mlp.shared_experts.down_proj.weight", 4),
    ("model.layers.0.mlp.up_proj.weight", 8), ("model.layers.3.mlp.shared_experts.up_proj.weight", 4),
])  # fmt: skip
def test_bits_by_name_go_before_those_by_role(name, bits):
    weight, four = Weight(name, (5, 256), "linear", ((name,),)), Int4(32)
    assert four.bits_of(weight) == bits
    assert [s.shape for s in four.stored(weight)] == [(5, 8, 32 * bits // 8), (5, 8)]


def product(packed, scale, inputs: int, level: int) -> ort.InferenceSession:
    """MatMulNBits of the stored tensors."""
    outputs, _, octets = packed.shape
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain=MICROSOFT, K=inputs, N=outputs, bits=4, block_size=2 * octets,
        accuracy_level=level,
    )  # fmt: skip
    sizes = {"x": inputs, "y": outputs}
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["t", size]) for name, size in sizes.items()]
    stored = [numpy_helper.from_array(a.numpy(), n) for a, n in ((packed, "w"), (scale, "s"))]
    graph = helper.make_graph([node], "one", values[:1], values[1:], stored)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 9), st.sampled_from([16, 32, 128]), st.integers(0, 99))
def test_onnxruntime_reads_the_packed_codes_so(outputs, inputs, rows, block, seed):
    """Random codes with scales of both signs, through the kernel, against the float64 product of decoded weights."""
    g = torch.Generator().manual_seed(seed)
    weight, four = Weight("w", (outputs, inputs), "linear", (("w",),)), Int4(block)
    packed, scale = four.encode(weight, torch.randn(outputs, inputs, generator=g))
    x = torch.randn(rows, inputs, generator=g)
    expected = x.double() @ four.decode(weight, [packed, scale]).double().T
    for level, limit in ((0, 1e-5), (4, 0.05)):  # float sums; activations in int8: 1/254 of a block's largest at most
        (found,) = product(packed, scale, inputs, level).run(None, {"x": x.numpy()})
        assert np.abs(found - expected.numpy()).max() <= limit * max(1.0, float(expected.abs().max()))


def test_experts_must_fill_their_blocks():
    weight = Weight("model.layers.1.mlp.experts.down_proj", (3, 8, 40), "down", (("w",),))
    with pytest.raises(ValueError, match="down_proj has 40 inputs, int4 needs a multiple of 32"):
        Int4(32).stored(weight)
