"""Quantized products in the step graph: Gemm nodes of FP8 linears, and the scales of FP8 and int4 experts.

A linear y = x W^T becomes, with W stored as e4m3 values and one float32 scale per output channel:

    row = max(|x|) / 448 per token, or one constant per tensor (static)     float32
    q   = QuantizeLinear(x / row, scale 1)                                  e4m3
    y   = MatMul(DequantizeLinear(q, 1), DequantizeLinear(W, 1)^T) * row * channel

Both DequantizeLinear have the constant scale 1 and both real scales are multiplied after the product, because TensorRT
takes no per-token scale, and where a weight's scale is a network input it does not use FP8 products: it dequantizes the
whole weight in every step (seen in the plan's instructions, TensorRT-RTX 1.7.1).
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from latentrt.export.models.base import Weight
from latentrt.export.quantization import WeightFormat
from latentrt.export.quantization.fp8 import LARGEST, SMALLEST_ABSMAX
from latentrt.plugins.contract import DOMAIN
from latentrt.plugins.moe_experts.op import CONTRACT as MOE_EXPERTS

_FLOAT, _BF16, _FP8 = ir.DataType.FLOAT, ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN
_TYPES = {torch.float8_e4m3fn: _FP8, torch.int8: ir.DataType.INT8}


def quantize(
    model: ir.Model, weights: list[Weight], weight_format: WeightFormat, static_scales: Mapping[str, float] | None = None
) -> None:
    """Rewrites the bf16 graph `model` in place; scales become inputs named `<weight>.scale`, after all others.

    static_scales: weight name -> scale of its activations (largest |x| / 448); dynamic per-token scales if None.
    """
    quantized = [weight for weight in weights if weight_format.is_quantized(weight)]
    rewriter = _Fp8Rewriter(model.graph, static_scales) if any(weight.role == "linear" for weight in quantized) else None
    by_name = {value.name: value for value in model.graph.inputs}
    for weight in quantized:
        value, (values, scales) = by_name[weight.name], weight_format.stored(weight)
        first = value.shape[0]  # of experts: those that this rank has
        value.type, value.shape = ir.TensorType(_TYPES[values.dtype]), ir.Shape([first, *values.shape[1:]])
        shape = ir.Shape([first, *scales.shape[1:]])
        scale = ir.Value(name=f"{weight.name}{scales.suffix}", shape=shape, type=ir.TensorType(_FLOAT))
        model.graph.inputs.append(scale)
        if weight.role == "linear":
            (use,) = value.uses()
            rewriter.linear(use.node, value, scale)
        else:
            _experts(value, scale, weight, 8 // weight_format.bits_of(weight))
    model.graph.sort()


def _experts(value: ir.Value, scale: ir.Value, weight: Weight, packed: int) -> None:
    (use,) = value.uses()
    assert use.node.domain == DOMAIN and use.node.op_type == MOE_EXPERTS.onnx_type, use.node
    names = [s.name for s in MOE_EXPERTS.inputs]
    use.node.resize_inputs(len(names))
    use.node.replace_input_with(names.index(f"{weight.role}_scale"), scale)
    use.node.attributes["packed"] = ir.AttrInt64("packed", packed)


class _Fp8Rewriter:
    def __init__(self, graph: ir.Graph, static_scales: Mapping[str, float] | None):
        self.graph, self.static_scales = graph, static_scales
        self.rows: dict[tuple, tuple[ir.Value, ir.Value]] = {}  # activations quantized already: several linears share them
        bf16 = np.asarray(1.0, ml_dtypes.bfloat16)
        self.one, self.one_bf16 = self._constant("fp8.one", np.float32(1)), self._constant("fp8.one_bf16", bf16)
        self.largest = self._constant("fp8.largest", np.float32(LARGEST))
        self.smallest = self._constant("fp8.smallest", np.float32(SMALLEST_ABSMAX))
        self.last_axis = self._constant("fp8.last_axis", np.array([-1], np.int64))

    def linear(self, gemm: ir.Node, weight: ir.Value, scale: ir.Value) -> None:
        assert gemm.op_type == "Gemm" and gemm.attributes.get_int("transB", 0) == 1, gemm
        output = gemm.outputs[0]
        self.before, self.prefix = gemm, gemm.name
        x, row = self._quantized_rows(gemm.inputs[0], weight.name)
        w = self._node("w", "DequantizeLinear", [weight, self.one_bf16], _BF16)
        w = self._node("w_t", "Transpose", [w], _BF16, perm=[1, 0])
        y = self._node("product", "MatMul", [x, w], _BF16)
        y = self._node("product_f32", "Cast", [y], to=int(_FLOAT))
        y = self._node("by_row", "Mul", [y, row])
        y = self._node("by_channel", "Mul", [y, scale])
        if len(gemm.inputs) > 2 and gemm.inputs[2] is not None:
            bias = self._node("bias_f32", "Cast", [gemm.inputs[2]], to=int(_FLOAT))
            y = self._node("biased", "Add", [y, bias])
        y = self._node("y", "Cast", [y], output.dtype, to=int(output.dtype))
        name, y.shape, y.type = output.name, output.shape, output.type
        ir.convenience.replace_all_uses_with(output, y, replace_graph_outputs=True)
        self.graph.remove(gemm, safe=True)
        y.name = name

    def _quantized_rows(self, x: ir.Value, weight_name: str) -> tuple[ir.Value, ir.Value]:
        """x [T, K] -> its dequantized e4m3 rows [T, K] bf16, still to be multiplied by the scale: [T, 1], or a scalar."""
        static = None if self.static_scales is None else self.static_scales[weight_name]
        if (x, static) not in self.rows:
            wide = self._node("x_f32", "Cast", [x], to=int(_FLOAT))
            row = self._row_scale(wide) if static is None else self._constant(f"{weight_name}.x_scale", np.float32(static))
            scaled = self._node("x_by_row", "Div", [wide, row])
            q = self._node("x_fp8", "QuantizeLinear", [scaled, self.one], _FP8, output_dtype=int(_FP8))
            self.rows[x, static] = self._node("x", "DequantizeLinear", [q, self.one_bf16], _BF16), row
        return self.rows[x, static]

    def _row_scale(self, wide: ir.Value) -> ir.Value:
        largest = self._node("x_max", "ReduceMax", [self._node("x_abs", "Abs", [wide]), self.last_axis], keepdims=1)
        return self._node("row", "Div", [self._node("x_limit", "Max", [largest, self.smallest]), self.largest])

    def _constant(self, name: str, array) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _node(self, suffix: str, op_type: str, inputs: list[ir.Value], dtype=_FLOAT, **attributes) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=f"{self.prefix}.{suffix}")
        node.outputs[0].name, node.outputs[0].type = f"{self.prefix}.{suffix}.out", ir.TensorType(dtype)
        self.graph.insert_before(self.before, node)
        return node.outputs[0]
