"""Bodies of the custom ops as ONNX functions, which ONNX Runtime inlines: what a model's nodes need, and how they are written.

Each plugins/<op>/ort.py has `body(call) -> list[onnx.FunctionProto]`, where `call` is an OpCall: the op's own, then those that
it calls, which are the same for all calls in a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from latentrt.plugins import ops
from latentrt.plugins.contract import DOMAIN, OpContract

MICROSOFT = "com.microsoft"
OPSET = 23
BIT_CAST_OPSET = 26  # has BitCast, which packed caches need; what 23 has means the same there, for more types
Shape = tuple[int | None, ...]  # None where the size is not fixed


@dataclass(frozen=True)
class OpCall:
    """How a graph uses an op. types (ONNX element types) and shapes hold the inputs that are present, by their names."""

    attributes: Mapping[str, int | float | str]
    types: Mapping[str, int]
    shapes: Mapping[str, Shape]


def bodies(model: onnx.ModelProto) -> list[onnx.FunctionProto]:
    """Bodies of all custom ops in `model`. All inputs of their nodes must have a type and a shape.

    Nodes of an op that are used alike share a body. Where some are used otherwise (experts of some layers in other types), each
    further kind gets a body of its own, and its nodes in `model` that overload's name. `model` takes the opset of its bodies.
    """
    values, found, called = _values(model.graph), [], {}
    for onnx_type, contract in ops.contracts().items():
        nodes = [n for n in model.graph.node if (n.domain, n.op_type) == (DOMAIN, onnx_type)]
        kinds: list[OpCall] = []
        for node, call in ((node, _call(node, contract, values)) for node in nodes):
            if call not in kinds:
                kinds.append(call)
                own, *others = ops.part(contract.name, "ort").body(call)
                own.overload = _overload(kinds.index(call))
                found.append(own)
                for other in others:
                    assert called.setdefault(other.name, other) == other, f"two functions {other.name}"
            node.overload = _overload(kinds.index(call))
    found += called.values()
    set_opset(model, found)
    return found


def set_opset(model: onnx.ModelProto, functions: Sequence[onnx.FunctionProto]) -> None:
    """The lowest that all functions know: inlined nodes are read as the model's opset says."""
    newest = max([OPSET, *(i.version for f in functions for i in f.opset_import if i.domain == "")])
    for imported in (i for holder in (model, *functions) for i in holder.opset_import if i.domain == ""):
        imported.version = newest


def _overload(kind: int) -> str:
    """The first kind needs none."""
    return f"kind{kind}" if kind else ""


def _values(graph: onnx.GraphProto) -> dict[str, tuple[int, Shape]]:
    """Element type and shape of inputs, initializers and values between nodes."""
    found = {}
    for value in (*graph.input, *graph.value_info):
        tensor = value.type.tensor_type
        sizes = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        found[value.name] = (tensor.elem_type, tuple(sizes))
    return found | {t.name: (t.data_type, tuple(t.dims)) for t in graph.initializer}


def _call(node: onnx.NodeProto, contract: OpContract, values: Mapping[str, tuple[int, Shape]]) -> OpCall:
    present = {s.name: values[name] for s, name in zip(contract.inputs, node.input, strict=False) if name}
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    attributes = contract.with_defaults({n: v.decode() if isinstance(v, bytes) else v for n, v in given.items()})
    return OpCall(attributes, {k: t for k, (t, _) in present.items()}, {k: s for k, (_, s) in present.items()})


class FunctionBuilder:
    """Collects nodes over value names; those of inputs and outputs are given. "" stands for an input left out."""

    def __init__(
        self, name: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Sequence[str] = (), opset: int = OPSET
    ):
        self.name, self.inputs, self.outputs, self.attributes = name, inputs, outputs, attributes
        self.opset, self.nodes = opset, []

    @classmethod
    def of(cls, contract: OpContract) -> "FunctionBuilder":
        """For the op's body, named as the contract names the op, its inputs, outputs and attributes."""
        parts = contract.inputs, contract.outputs, contract.attributes
        return cls(contract.onnx_type, *([part.name for part in specs] for specs in parts))

    def __call__(self, op_type: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes):
        """Appends a node; returns its output's name, or a list of names where there are several."""
        names = [f"{op_type}.{len(self.nodes)}.{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value, dtype=np.int64) -> str:
        return self("Constant", value=numpy_helper.from_array(np.asarray(value, dtype)))

    def cast(self, value: str, to: int) -> str:
        return self("Cast", value, to=to)

    def finish(self, *outputs: str) -> onnx.FunctionProto:
        """The function; `outputs` are the values that it returns, in order."""
        self.nodes += [helper.make_node("Identity", [v], [n]) for v, n in zip(outputs, self.outputs, strict=True)]
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_function(DOMAIN, self.name, self.inputs, self.outputs, self.nodes, opsets, self.attributes)
