"""Puts traced parts together: copies of them in one graph, named per layer, with constants shared."""

import onnx_ir as ir

from latentrt.export.models.base import weight_name
from latentrt.export.tracing import CACHE, OPSET, Shapes
from latentrt.plugins import ops
from latentrt.plugins.contract import DOMAIN, VERSION
from latentrt.plugins.step_graph import attention_output, cache_name, layer_output, layer_prefix, mlp_output, updated

IR_VERSION = 11


class Stamper:
    """Copies traced parts into one graph, renaming values and sharing constants."""

    def __init__(self, shapes: Shapes):
        self.shapes = shapes
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self.caches: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.constants: dict[tuple, ir.Value] = {}
        self.batch = {name: shapes.values[name].as_input(name) for name in shapes.inputs}

    def stamp_layer(self, part: ir.Model, layer: int, feeds: dict[str, ir.Value]) -> ir.Value:
        """Stamps what `trace_layer` made and names its outputs; returns hidden. `feeds`: hidden and angles."""
        self.caches.append(self.shapes.values[CACHE].as_input(cache_name(layer)))
        values = self.stamp(part, layer_prefix(layer), feeds | {CACHE: self.caches[-1]})
        names = layer_output(layer), updated(cache_name(layer)), attention_output(layer), mlp_output(layer)
        for value, name in zip(values, names, strict=True):
            value.name = name
        self.outputs.append(values[1])
        return values[0]

    def stamp(self, part: ir.Model, prefix: str, feeds: dict[str, ir.Value] = {}) -> list[ir.Value]:
        """Appends a copy of `part`; inputs are taken from batch and `feeds`, all others are weights. Returns the outputs."""
        values: dict[ir.Value | None, ir.Value | None] = {None: None}
        given = self.batch | feeds
        for value in part.graph.inputs:
            values[value] = given[value.name] if value.name in given else self._weight(value, prefix)
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
        name = weight_name(f"{prefix.removeprefix('model.')}{value.name}")
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
            opset_imports={"": OPSET, DOMAIN: VERSION}, name=f"{self.shapes.family.model_type}_step",
        )  # fmt: skip
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="latentrt")


def _value_name(node: ir.Node, index: int) -> str:
    """The contract's output name for custom ops, so that validation finds topk_ids; the exporter's name otherwise."""
    contract = ops.contracts()[node.op_type] if node.domain == DOMAIN else None
    if contract is None or contract.collective:  # of which a layer has several
        return node.outputs[index].name
    return f"{contract.name}.{contract.outputs[index].name}"
