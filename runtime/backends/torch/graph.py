"""Compiles an ONNX step graph into a flat list of Python closures on torch tensors.

Every value has a slot; a closure reads slots, calls one torch function and writes slots, and forgets values that nobody
reads again. Constants, and what follows from weights alone, are computed once. Integers that say shapes stay on the host.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper

from latentrt.runtime.backends.torch import custom_ops as torch_custom_ops
from latentrt.runtime.backends.torch import fusion as torch_fusion
from latentrt.runtime.backends.torch import merging as torch_merging
from latentrt.runtime.backends.torch import quantizing as torch_quantizing
from latentrt.runtime.backends.torch.ops import DTYPES, HOST_ARGUMENTS, TABLE, Node

COLLECTIVES = ("AllGather", "ReduceScatter", "DistCollective")
HOST_OPS = ("Shape", "ConstantOfShape")
NOT_FOLDED = ("DequantizeLinear",)  # on a GPU: FP8 weights stay FP8


class UnknownOpError(NotImplementedError):
    """A graph holds an op that the torch backend lacks."""


def read(path: Path) -> onnx.ModelProto:
    """A graph without its external tensors."""
    return onnx.load(str(path), load_external_data=False)


def without_ranks(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph of several ranks as that of one process, which has all experts: nothing to gather, nothing to sum up."""
    for node in model.graph.node:
        if node.op_type in COLLECTIVES:
            del node.attribute[:]
            node.op_type, node.domain = "Identity", ""
    return model


def _table(custom_ops: str) -> dict[str, Callable]:
    return TABLE | torch_custom_ops.table(custom_ops) | torch_fusion.table() | torch_merging.table()


def check_ops(model: onnx.ModelProto, custom_ops: str) -> None:
    """UnknownOpError for a graph with ops that are not here."""
    table = _table(custom_ops)
    unknown = sorted({n.op_type for n in model.graph.node if n.op_type not in table and n.op_type != "Constant"})
    if unknown:
        raise UnknownOpError(f"the torch backend has no op {', '.join(unknown)}")


class StepProgram:
    """A step graph ready to run on `device`. `weights` holds the graph's weight inputs and external initializers by name.

    custom_ops: "triton" or "reference", see torch_custom_ops. folded: what was made of weights alone, such as merged weights;
    programs of the same weights that are given one dictionary hold it once. UnknownOpError names what the graph needs and is
    not here.
    """

    def __init__(
        self, model: onnx.ModelProto, weights: Mapping[str, torch.Tensor], device: torch.device | str,
        custom_ops: str, fuse: bool = True, folded: dict[tuple, tuple[torch.Tensor, ...]] | None = None,
    ):  # fmt: skip
        self.device = torch.device(device)
        self._table = _table(custom_ops)
        check_ops(model, custom_ops)
        nodes = [_node(n) for n in model.graph.node]
        self._host = _constants(model, nodes)
        nodes = [n for n in nodes if n.op_type != "Constant"]
        if fuse:
            nodes = torch_fusion.fuse(nodes, self._host, [o.name for o in model.graph.output])
            nodes = torch_quantizing.quantize(torch_merging.merge(nodes, weights))
        self.op_counts = Counter(n.op_type for n in nodes)  # fused groups among them
        self._known: dict[str, torch.Tensor] = dict(weights)
        self._weights, self._folded = frozenset(weights), {} if folded is None else folded
        self._on_device: dict[str, torch.Tensor] = {}
        self._slots: dict[str, int] = {}
        self.inputs = {i.name: self._slot(i.name) for i in model.graph.input if i.name not in weights}
        self._outputs = [o.name for o in model.graph.output]
        self._calls = self._compile(nodes)
        self._template: list = [None] * len(self._slots)
        for name in self._read:
            self._template[self._slots[name]] = self._value(name)
        self._known.clear()  # weights that were merged or folded may go: no call reads them
        self._folded = {}

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One step. `inputs` by name, on the device; caches are written in place. Returns outputs by name."""
        values = self._template.copy()
        for name, slot in self.inputs.items():
            values[slot] = inputs[name]
        for call in self._calls:
            call(values)
        return {name: values[self._slots[name]] for name in self._outputs}

    def _slot(self, name: str) -> int:
        return self._slots.setdefault(name, len(self._slots))

    def _value(self, name: str) -> torch.Tensor | None:
        """What a slot holds before the first call: a weight, a constant, or nothing."""
        if name in self._known:
            return self._known[name]
        return self._on_device.get(name)

    def _compile(self, nodes: list[Node]) -> list[Callable]:
        placed, host = [], set()  # host: values that live in host memory
        for node in nodes:
            function, arguments, on_host = self._bind(node, host)
            if self._fold(node, function, arguments):
                continue
            host |= set(node.outputs) if on_host else set()
            placed.append((node, function, arguments))
        self._read = {n for node, _, _ in placed for n in node.inputs if n in self._slots} | {*self._outputs}
        last = {name: k for k, (node, _, _) in enumerate(placed) for name in (*node.inputs, *node.outputs)}
        kept = {*self._outputs, *self.inputs, *self._known, *self._host}
        calls = []
        for k, (node, function, arguments) in enumerate(placed):
            names = dict.fromkeys((*node.inputs, *node.outputs))
            dead = [self._slot(n) for n in names if n and last[n] == k and n not in kept]
            calls.append(_call(function, arguments, [self._slot(n) for n in node.outputs], dead))
        return calls

    def _bind(self, node: Node, host: set[str]) -> tuple[Callable, list, bool]:
        """The node's callable; per argument a slot, or a finished value in a 1-tuple; whether its outputs are on the host."""
        function = self._table[node.op_type](node)
        integers = HOST_ARGUMENTS.get(node.op_type, ())
        tensors = [n for k, n in enumerate(node.inputs) if n and k not in integers]
        constant = all(not n or n in self._host for n in node.inputs)
        shapes = any(n in host for n in tensors) and all(n in host or n in self._host for n in tensors)
        on_host = node.op_type in HOST_OPS or shapes
        arguments = []
        for k, name in enumerate(node.inputs):
            if not name:
                arguments.append((None,))
            elif k in integers and name in self._host:
                arguments.append((self._host[name].reshape(-1).tolist(),))
            elif k in integers:
                arguments.append([self._slot(name)])
            elif name in self._host and (on_host or constant):
                arguments.append((self._host[name],))
            else:
                self._place(name)
                arguments.append(self._slot(name))
        return function, arguments, on_host

    def _place(self, name: str) -> None:
        if name in self._host and name not in self._on_device:
            self._on_device[name] = self._host[name].to(self.device)

    def _fold(self, node: Node, function: Callable, arguments: list) -> bool:
        """Computes a node that depends on constants and weights alone, if what it makes may stay in memory."""
        if not all(not n or n in self._host or n in self._known for n in node.inputs):
            return False
        if node.op_type in NOT_FOLDED and self.device.type != "cpu":
            return False
        named = {self._slots[n]: n for n in node.inputs if n in self._slots}
        values = [a[0] if isinstance(a, tuple) else self._value(named[a]) for a in arguments]
        results = self._once(node, lambda: function(*values))
        target = self._host if all(not n or n in self._host for n in node.inputs) else self._known
        for name, result in zip(node.outputs, results, strict=False):
            target[name] = result
        return True

    def _once(self, node: Node, compute: Callable) -> tuple[torch.Tensor, ...]:
        """What a node makes of weights alone is the same for every program that has the weights; other nodes are computed."""
        def results() -> tuple[torch.Tensor, ...]:
            found = compute()
            return found if isinstance(found, tuple) else (found,)

        if not node.inputs or not self._weights >= set(node.inputs):
            return results()
        key = (node.op_type, node.inputs, repr(sorted(node.attributes.items())))
        if key not in self._folded:
            self._folded[key] = results()
        return self._folded[key]


def _call(function: Callable, arguments: list, outputs: list[int], dead: list[int]) -> Callable[[list], None]:
    """A closure over slots. An argument is a slot, a [slot] whose integers are wanted, or a finished value in a tuple."""
    plain = all(isinstance(a, int) for a in arguments)
    single = outputs[0] if len(outputs) == 1 else None

    def gather(values: list) -> list:
        if plain:
            return [values[a] for a in arguments]
        return [
            values[a] if isinstance(a, int) else a[0] if isinstance(a, tuple) else values[a[0]].reshape(-1).tolist()
            for a in arguments
        ]

    def call(values: list) -> None:
        result = function(*gather(values))
        if single is not None:
            values[single] = result
        else:
            for slot, part in zip(outputs, result, strict=True):
                values[slot] = part
        for slot in dead:
            values[slot] = None

    return call


def _node(proto: onnx.NodeProto) -> Node:
    attributes = {a.name: _attribute(a) for a in proto.attribute}
    return Node(proto.op_type, proto.name, tuple(proto.input), tuple(proto.output), attributes)


def _attribute(proto: onnx.AttributeProto):
    value = onnx.helper.get_attribute_value(proto)
    if isinstance(value, bytes):
        return value.decode()
    return tensor(value) if isinstance(value, onnx.TensorProto) else value


def tensor(proto: onnx.TensorProto) -> torch.Tensor:
    """A tensor stored in the graph itself."""
    dtype = DTYPES[proto.data_type]
    if dtype in (torch.bfloat16, torch.float8_e4m3fn):
        return torch.from_numpy(numpy_helper.to_array(proto).astype("float32")).to(dtype)
    return torch.from_numpy(numpy_helper.to_array(proto).copy())


def _constants(model: onnx.ModelProto, nodes: list[Node]) -> dict[str, torch.Tensor]:
    found = {n.outputs[0]: n.attributes["value"] for n in nodes if n.op_type == "Constant"}
    for proto in model.graph.initializer:
        if proto.data_location != onnx.TensorProto.EXTERNAL:
            found[proto.name] = tensor(proto)
    return found
