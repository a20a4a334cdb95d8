"""The torch backend's pieces on small graphs: compilation, freeing, shapes on the host, fused ops, padded shapes."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from latentrt.runtime.backends import padding
from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.backends.torch import fused_ops as torch_fused_ops
from latentrt.runtime.backends.torch.graph import StepProgram, UnknownOpError


def test_decode_shapes():
    def batch(rows, cached, width=3):
        return pack([SequenceRows(r, cached, [len(r) - 1] if r else []) for r in rows], np.zeros((len(rows), width)))

    assert padding.decode_shape(batch([[1]] * 5, 9)) == padding.StepShape(8, 8, 8, 4)
    assert padding.decode_shape(batch([[1]] * 5, 9), max_pages=3).max_pages == 3
    assert padding.decode_shape(batch([[1, 2]], 9)) is None
    assert padding.decode_shape(batch([[1, 2], []], 9)) is None, "as many rows as sequences is not enough"
    assert padding.decode_shape(batch([[1]] * 300, 9)) is None


def onnx_model(nodes: list, shape=("T", 4)) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y]))


def test_unknown_op_is_named():
    with pytest.raises(UnknownOpError, match="no op Selu"):
        StepProgram(onnx_model([helper.make_node("Selu", ["x"], ["y"])]), {}, "cpu", "reference")


def test_shapes_are_computed_on_the_host():
    """[T, 4] -> [4 * T] through Shape, Gather, Mul, Concat."""
    constants = [
        helper.make_node("Constant", [], [n], value=helper.make_tensor(n, TensorProto.INT64, [1], [v]))
        for n, v in (("zero", 0), ("four", 4))
    ]
    nodes = [
        *constants, helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Gather", ["s", "zero"], ["t"], axis=0),
        helper.make_node("Mul", ["t", "four"], ["n"]), helper.make_node("Reshape", ["x", "n"], ["y"]),
    ]  # fmt: skip
    x = torch.randn(3, 4)
    assert torch.equal(StepProgram(onnx_model(nodes), {}, "cpu", "reference").run({"x": x})["y"], x.flatten())


def test_values_are_freed():
    program = StepProgram(
        onnx_model([helper.make_node("Abs", ["x"], ["a"]), helper.make_node("Abs", ["a"], ["y"])]), {}, "cpu", "reference"
    )
    values = program._template.copy()
    values[program._slots["x"]] = torch.ones(2)
    for call in program._calls:
        call(values)
    assert values[program._slots["a"]] is None and values[program._slots["y"]] is not None


def test_fused_ops_take_slices():
    """Inputs of fused ops are parts of wider products."""
    wide = torch.randn(5, 40)
    expected = torch.nn.functional.silu(wide[:, :8]) * wide[:, 8:16]
    assert torch.allclose(torch_fused_ops.swiglu()(wide[:, :8], wide[:, 8:16]), expected)
    total, normed = torch_fused_ops.sum_norm(1e-6)(torch.ones(8), wide[:, :8], wide[:, 8:16], wide[:, 16:24])
    assert torch.allclose(total, wide[:, :8] + wide[:, 8:16] + wide[:, 16:24], atol=1e-6)
    assert torch.allclose(normed.square().mean(-1), torch.ones(5), atol=1e-4)
