"""Puts traced parts together: copies of them in one graph, named per layer, with constants shared."""

import numpy as np
import onnx_ir as ir

from export.tracing import BATCH_INPUTS, CUSTOM_OPS, OPSET, Shapes
from plugins.contract import DOMAIN, VERSION

IR_VERSION = 11


def cache_name(layer: int) -> str:
    """Graph input of a layer's latent cache; its output has the suffix ".updated"."""
    return f"latent_cache.{layer}"


def weight_name(parameter: str) -> str:
    """Name in `weights` of a parameter of DeepseekV2Step: embed.x and layers.x lie under model., head.lm_head does not."""
    parameter = parameter.removeprefix("embed.").removeprefix("head.")
    return parameter if parameter.startswith("lm_head.") else f"model.{parameter}"


class Stamper:
    """Copies traced parts into one graph, renaming values and sharing constants."""

    def __init__(self, shapes: Shapes):
        self.shapes = shapes
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self.caches: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.constants: dict[tuple, ir.Value] = {}
        int32 = ir.TensorType(ir.DataType.INT32)
        self.batch = {
            name: ir.Value(name=name, shape=ir.Shape(shapes.batch_shape(name)), type=int32) for name in BATCH_INPUTS
        }

    def add_cache(self, layer: int) -> ir.Value:
        dtype = ir.DataType.from_numpy(np.dtype(str(self.shapes.cache_dtype).removeprefix("torch.")))
        shape = ir.Shape(["num_pages", *self.shapes.page_shape()])
        self.caches.append(ir.Value(name=cache_name(layer), shape=shape, type=ir.TensorType(dtype)))
        return self.caches[-1]

    def stamp(self, part: ir.Model, prefix: str, feeds: dict[str, ir.Value]) -> list[ir.Value]:
        """Appends a copy of `part`; inputs are taken from `feeds`, all others are weights. Returns the outputs."""
        values: dict[ir.Value | None, ir.Value | None] = {None: None}
        for value in part.graph.inputs:
            values[value] = feeds[value.name] if value.name in feeds else self._weight(value, prefix)
        for value in part.graph.initializers.values():
            values[value] = self._constant(value)
        for node in part.graph:
            values |= self._copy(node, prefix, values)
        return [values[output] for output in part.graph.outputs]

    def _copy(self, node: ir.Node, prefix: str, values: dict) -> dict:
        if node.op_type == "Constant":
            return {node.outputs[0]: self._constant(node.outputs[0])}
        copy = ir.Node(
            node.domain, node.op_type, [values[i] for i in node.inputs], list(node.attributes.values()),
            num_outputs=len(node.outputs), name=f"{prefix}{node.name}",
        )  # fmt: skip
        for index, (old, new) in enumerate(zip(node.outputs, copy.outputs, strict=True)):
            new.name, new.shape, new.type = f"{prefix}{_value_name(node, index)}", old.shape, old.type
        self.nodes.append(copy)
        return dict(zip(node.outputs, copy.outputs, strict=True))

    def _weight(self, value: ir.Value, prefix: str) -> ir.Value:
        name = f"{prefix}{value.name}" if prefix.startswith("model.layers.") else weight_name(value.name)
        self.weights.append(ir.Value(name=name, shape=value.shape, type=value.type))
        return self.weights[-1]

    def _constant(self, value: ir.Value) -> ir.Value:
        array = ir.convenience.get_const_tensor(value).numpy()
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            name = f"constant.{len(self.constants)}"
            tensor = ir.tensor(array, name=name)
            self.constants[key] = ir.Value(
                name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.constants[key]

    def finish(self, outputs: list[ir.Value]) -> ir.Model:
        inputs = [*self.batch.values(), *self.caches, *self.weights]
        graph = ir.Graph(
            inputs, outputs + self.outputs, nodes=self.nodes, initializers=list(self.constants.values()),
            opset_imports={"": OPSET, DOMAIN: VERSION}, name="deepseek_v2_step",
        )  # fmt: skip
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="latentrt")


def _value_name(node: ir.Node, index: int) -> str:
    """The contract's output name for custom ops, so that validation finds topk_ids; the exporter's name otherwise."""
    for op in CUSTOM_OPS:
        if node.domain == DOMAIN and node.op_type == op.CONTRACT.onnx_type:
            return f"{op.CONTRACT.name}.{op.CONTRACT.outputs[index].name}"
    return node.outputs[index].name
