"""CPU lowering: the step graph for ONNX Runtime, with function bodies for the custom ops and weights as external data.

fp32 keeps the graph's own products. int8 and int4 turn linears into MatMulNBits, absorbed products into one MatMulNBits a
head, and experts into QMoE. At accuracy "exact" all sums are float32; "fast" lets products quantize activations to int8. What
is fast has weights in panels for own kernels (native.py); ONNX Runtime's get them back in rows when a session begins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from latentrt.export.errors import BuildError
from latentrt.export.lowering.base import Lowered, LoweredEngine, Lowering, Stage
from latentrt.export.lowering.onnxruntime import choices
from latentrt.export.lowering.onnxruntime.choices import CpuOptions
from latentrt.export.lowering.onnxruntime.native import with_own_kernels
from latentrt.export.models.base import Config, Weight
from latentrt.export.options import TargetSpec
from latentrt.export.quantization import Float32, Int4, Int8, Panels, WeightFormat
from latentrt.export.weight_set import StoredWeight
from latentrt.plugins.moe_experts.op import CONTRACT as MOE_EXPERTS
from latentrt.plugins.onnx_function import MICROSOFT, bodies

OWN_KERNELS = 3  # version of what the graph with own kernels asks of them: another one makes bundles out of date
_ACCURACY_LEVEL = {"exact": 0, "fast": 4}  # of MatMulNBits and 4-bit QMoE: 0 float32 activations, 4 int8
_DTYPES = {torch.float32: ir.DataType.FLOAT, torch.uint8: ir.DataType.UINT8}


class OnnxruntimeLowering(Lowering):
    """For the cpu target."""

    gate_up_layout = "interleaved"
    dtype = torch.float32
    executes = True

    def __init__(self, spec: TargetSpec):
        super().__init__(replace(spec, weights=""))
        self.choices = choices.resolve(spec)

    @property
    def backend_version(self) -> str:
        return version("onnxruntime")

    @property
    def cache_format(self) -> str:
        return self.choices.cache_format

    def tools(self) -> dict:
        return super().tools() | {"own_kernels": OWN_KERNELS}

    def options(self) -> dict[str, str | int | float | bool]:
        return super().options() | {"accuracy": self.choices.accuracy}

    def weight_format(self, weights: list[Weight]) -> WeightFormat:
        return weight_format(weights, self.choices).keeping(self.spec.plain_modules)

    def stored_weights(self, weights: list[Weight]) -> list[Weight]:
        return stored_weights(weights)

    def lower(
        self, models: Mapping[str, ir.Model], config: Config, weights: list[Weight],
        located: Mapping[str, StoredWeight], files: Path, scratch: Path, stage: Stage,
        activation_scales: Mapping[str, float] | None = None,
    ) -> Lowered:  # fmt: skip
        ((form, model),), names = models.items(), {w.name for w in weights}
        inputs, outputs = [v for v in model.graph.inputs if v.name not in names], list(model.graph.outputs)
        with stage("lower to ONNX Runtime"):
            proto = lower(model, weights, located, self.weight_format(weights), self.choices)
            graph = scratch / "graph.onnx"
            graph.write_bytes(proto.SerializeToString())
            native = None
            if self.choices.precision != "fp32" and (own := with_own_kernels(proto)):
                native = scratch / "native.onnx"
                native.write_bytes(own.SerializeToString())
        return Lowered({form: LoweredEngine(graph, native=native)}, inputs, outputs, self.limits(config))


_BLOCKS = (128, 64, 32, 16)  # inputs of an expert that can share a scale


def weight_format(weights: list[Weight], options: CpuOptions) -> WeightFormat:
    """The weight format of a precision. Block-wise 8-bit experts have int8 activations only, so "exact" has none.

    int4's blocks fit those of a checkpoint's own integers, so that these can be kept. Raises BuildError where experts have
    sizes that int4 does not take.
    """
    if options.precision == "fp32":
        return Float32()
    inputs = {weight.shape[-1] for weight in weights if weight.role in ("gate_up", "down")}
    blocks = [b for b in _BLOCKS if all(n % b == 0 for n in inputs)]
    if options.precision == "int4":
        block = Int4.fitting(weights, _BLOCKS)
        if block is None:
            raise BuildError(f"precision int4 takes experts whose inputs are multiples of 16, found {sorted(inputs)}; use int8")
        return _fast(Int4(block), options)
    if options.accuracy == "exact" or not blocks:
        return Int8()
    return _fast(Int8(expert_block_size=blocks[0]), options)


def _fast(rows: WeightFormat, options: CpuOptions) -> WeightFormat:
    """In the order in which own kernels read it, if they will: ONNX Runtime's products alone are exact."""
    return Panels(rows) if options.accuracy == "fast" else rows


def stored_weights(weights: list[Weight]) -> list[Weight]:
    """Weights in the layout of ONNX Runtime's kernels: rows of gate_proj and up_proj take turns."""
    return [_interleaved(w) if w.role == "gate_up" else w for w in weights]


def _interleaved(weight: Weight) -> Weight:
    def make(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.stack([gate, up], 1).flatten(0, 1)[None]

    return replace(weight, make=make)


def lower(
    model: ir.Model, weights: list[Weight], located: Mapping[str, StoredWeight], weight_format: WeightFormat,
    options: CpuOptions,
) -> onnx.ModelProto:
    """Rewrites `model` in place; `located` says where each stored tensor lies, beside the model file."""
    graph = model.graph
    by_name = {value.name: value for value in graph.inputs}
    rewriter = _CpuRewriter(graph, located, weight_format, options)
    for weight in weights:
        value = by_name[weight.name]
        graph.inputs.remove(value)
        rewriter.replace(weight, value)
    model.opset_imports[MICROSOFT] = graph.opset_imports[MICROSOFT] = 1
    graph.sort()
    proto = ir.to_proto(model)
    proto.functions.extend(bodies(proto))
    for node in (n for function in proto.functions for n in function.node if n.op_type == "QMoE"):
        node.attribute.append(onnx.helper.make_attribute("accuracy_level", _ACCURACY_LEVEL[options.accuracy]))
    return proto


class _CpuRewriter:
    """Turns weight inputs into initializers and their products into what the precision calls for."""

    def __init__(self, graph: ir.Graph, located, weight_format: WeightFormat, options: CpuOptions):
        self.graph, self.located, self.format, self.options = graph, located, weight_format, options
        self.rows = weight_format.rows if isinstance(weight_format, Panels) else weight_format

    def replace(self, weight: Weight, value: ir.Value) -> None:
        quantized = self.format.is_quantized(weight)
        users = list(value.uses())
        if weight.role in ("gate_up", "down"):
            self._experts(weight, value, users, quantized)
        elif quantized and weight.role in ("linear", "head"):
            self._linear(weight, users[0].node)
        elif quantized:
            self._absorbed(weight, users[0].node)
        else:
            value.replace_all_uses_with(self._initializer(weight.name))

    def _initializer(self, name: str, index: int | None = None) -> ir.Value:
        """The stored tensor `name`, or its slice `index` along axis 0, as external data."""
        stored = self.located[name]
        shape, offset, size = stored.shape, stored.offset, stored.size
        if index is not None:
            size //= shape[0]
            offset, shape, name = offset + index * size, shape[1:], f"{name}.{index}"
        dtype = _DTYPES[stored.dtype]
        tensor = ir.ExternalTensor(stored.file, offset, size, dtype, shape=ir.Shape(shape), name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _quantized(self, weight: Weight, index: int | None = None) -> list[ir.Value]:
        """Values and scales of a quantized weight by rows, or of its slice `index` along axis 0."""
        values, scale = (self._initializer(weight.name + suffix, index) for suffix in ("", ".scale"))
        if self.rows is self.format:
            return [values, scale]
        shapes = [s.shape[index is not None :] for s in self.rows.stored(weight)]
        axis = len(shapes[1]) - 2  # of outputs
        return [self._in_rows(values, shapes[0], axis, -2), self._in_rows(scale, shapes[1], axis, -1)]

    def _in_rows(self, stored: ir.Value, shape: tuple[int, ...], axis: int, lanes: int) -> ir.Value:
        """Panels, whose outputs lie at axes `axis` and `lanes` -> rows of `shape`, by nodes that a session folds at once."""
        found, lanes = list(stored.shape), lanes + len(stored.shape)
        order = [*range(axis + 1), lanes, *(k for k in range(axis + 1, len(found)) if k != lanes)]
        filled = (*shape[:axis], found[axis] * found[lanes], *shape[axis + 1 :])
        value = self._node("Transpose", [stored], f"{stored.name}.turned", [found[k] for k in order], {"perm": order})
        value = self._node("Reshape", [value, self._constant(filled)], f"{stored.name}.filled", filled)
        if filled != shape:
            ends = [self._constant([n]) for n in (0, shape[axis], axis)]
            value = self._node("Slice", [value, *ends], f"{stored.name}.rows", shape)
        return value

    def _node(self, op_type: str, inputs: list, name: str, shape, attributes: dict | None = None) -> ir.Value:
        """The output of a new node, which has the type of its first input."""
        node = ir.node(op_type, inputs, attributes or {}, name=name)
        value, value.name, value.shape, value.type = node.outputs[0], name, ir.Shape(shape), ir.TensorType(inputs[0].dtype)
        self.graph.append(node)
        return value

    def _constant(self, numbers: Sequence[int]) -> ir.Value:
        name = f"int64.{'.'.join(map(str, numbers))}"
        if name not in self.graph.initializers:
            tensor = ir.tensor(list(numbers), dtype=ir.DataType.INT64, name=name)
            self.graph.register_initializer(
                ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
            )
        return self.graph.initializers[name]

    def _linear(self, weight: Weight, gemm: ir.Node) -> None:
        assert gemm.op_type == "Gemm" and gemm.attributes.get_int("transB", 0) == 1, gemm
        bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
        inputs = [gemm.inputs[0], *self._quantized(weight)]
        self._swap(gemm, [self._mat_mul_nbits(weight, inputs + ([None, None, bias] if bias else []), *weight.shape)])

    def _mat_mul_nbits(self, weight: Weight, inputs: list, outputs: int, width: int) -> ir.Node:
        bits, octets = self.format.bits_of(weight), inputs[1].shape[-1]  # [out, blocks, bytes of a block]
        attributes = {
            "K": width, "N": outputs, "bits": bits, "block_size": octets * 8 // bits,
            "accuracy_level": _ACCURACY_LEVEL[self.options.accuracy],
        }  # fmt: skip
        return ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT)

    def _absorbed(self, weight: Weight, matmul: ir.Node) -> None:
        """[H, T, in] x [H, in, out] -> [H, T, out]: one product a head, since MatMulNBits has no batch of weights."""
        heads, width, outputs = weight.shape
        split = ir.node("Split", [matmul.inputs[0]], {"axis": 0, "num_outputs": heads}, num_outputs=heads)
        products = [
            self._mat_mul_nbits(weight, [rows, *self._quantized(weight, h)], outputs, width)
            for h, rows in enumerate(split.outputs)
        ]
        concat = ir.node("Concat", [p.outputs[0] for p in products], {"axis": 0})
        for value in (*split.outputs, *(p.outputs[0] for p in products)):
            value.type = ir.TensorType(ir.DataType.FLOAT)
        self._swap(matmul, [split, *products, concat])

    def _experts(self, weight: Weight, value: ir.Value, users: list, quantized: bool) -> None:
        stored, *scales = self._quantized(weight) if quantized else [self._initializer(weight.name)]
        value.replace_all_uses_with(stored)
        node = users[0].node
        node.attributes["gate_up_layout"] = ir.AttrString("gate_up_layout", "interleaved")
        if quantized:
            node.attributes["packed"] = ir.AttrInt64("packed", 8 // self.format.bits_of(weight))
            names = [s.name for s in MOE_EXPERTS.inputs]
            node.resize_inputs(len(names))
            scale = names.index("gate_up_scale" if weight.role == "gate_up" else "down_scale")
            node.replace_input_with(scale, scales[0])

    def _swap(self, old: ir.Node, new: list[ir.Node]) -> None:
        """Puts nodes in the place of one; the last one's output takes over the old one's name, shape and users."""
        before, after = old.outputs[0], new[-1].outputs[0]
        after.shape, after.type, name = before.shape, before.type, before.name
        for index, node in enumerate(new):
            node.name = f"{old.name}.{index}" if len(new) > 1 else old.name
            for k, output in enumerate(node.outputs):
                output.name = output.name or f"{name}.{index}.{k}"
        ir.convenience.replace_nodes_and_values(self.graph, old, [old], new, [before], [after])
        after.name = name
