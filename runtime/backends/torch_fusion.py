"""Groups of nodes that the torch backend runs as one: fewer, larger kernels, since a decode step is made of small ones.

A pattern is (op_type, *patterns of the inputs), or the name of a value to capture; one name captures one value. Inputs
beyond those of a pattern are not looked at. Fused sums and products are float32 inside and rounded once.
"""

from collections.abc import Callable, Iterable

import torch

from runtime.backends import torch_fused_ops
from runtime.backends.torch_ops import Node

Pattern = str | tuple
BFLOAT16 = 16  # ONNX's number of the type
_EVEN = ("Squeeze", ("Slice", "pairs", "from_0", "to_1", "axis", "?step"))
_ODD = ("Squeeze", ("Slice", "pairs", "from_1", "to_2", "axis", "?step"))
ROTATED = (
    "Reshape",
    (
        "Concat",
        ("Unsqueeze", ("Sub", ("Mul", _EVEN, "cos"), ("Mul", _ODD, "sin"))),
        ("Unsqueeze", ("Add", ("Mul", _EVEN, "sin"), ("Mul", _ODD, "cos"))),
    ),
)
SWIGLU = ("Mul", ("Mul", "gate", ("Sigmoid", "gate")), "up")
SUM_NORM = (
    ("RMSNormalization", ("Add", "a", ("Add", "b", "c")), "weight"),
    ("RMSNormalization", ("Add", "a", "b"), "weight"),
)
_WIDE = ("Cast", "x")
_ROW = ("Div", ("Max", ("ReduceMax", ("Abs", _WIDE)), "smallest"), "largest")
QUANTIZED_ROWS = ("QuantizeLinear", ("Div", _WIDE, "row"), "one")  # and "row" is _ROW
FLOAT8_LINEAR = (
    "Mul",
    (
        "Mul",
        (
            "Cast",
            ("MatMul", ("DequantizeLinear", "q", "one"), ("Transpose", ("DequantizeLinear", "weight", "one"))),
        ),
        "row",
    ),
    "channel",
)


def table() -> dict[str, Callable[[Node], Callable]]:
    """Like `torch_ops.TABLE`, for what fusing makes."""
    return {
        "Rotate": lambda node: torch_fused_ops.rotate,
        "SwiGlu": lambda node: torch_fused_ops.swiglu,
        "SumNorm": lambda node: torch_fused_ops.sum_norm(node.attributes["epsilon"]),
        "QuantizeRows": lambda node: torch_fused_ops.quantize_rows(node.attributes["smallest"]),
        "Float8Linear": lambda node: torch_fused_ops.float8_linear,
        "RMSNormalization": lambda node: torch_fused_ops.rms_norm(node.attributes.get("epsilon", 1e-5)),
    }


def fuse(nodes: list[Node], constants: dict[str, torch.Tensor], outputs: list[str]) -> list[Node]:
    """The nodes with every group that a pattern matches replaced by one node, and what nobody reads left out."""
    for rule in (_rotations, _swiglus, _sum_norms, _quantized_rows, _float8_linears):
        nodes = _live(rule(nodes, _Graph(nodes, constants, outputs)), outputs)
    return nodes


class _Graph:
    """Who makes a value, and how many read it."""

    def __init__(self, nodes: list[Node], constants: dict[str, torch.Tensor], outputs: Iterable[str]):
        self.makers = {name: node for node in nodes for name in node.outputs}
        self.constants, self.readers = constants, dict.fromkeys(outputs, 1)
        for name in (n for node in nodes for n in node.inputs):
            self.readers[name] = self.readers.get(name, 0) + 1

    def match(self, name: str, pattern: Pattern, found: dict[str, str]) -> bool:
        """Whether `name` is made as `pattern` says; captured names go to `found`. "?x" captures what may be absent."""
        if isinstance(pattern, str):
            return found.setdefault(pattern, name) == name
        node = self.makers.get(name)
        if node is None or node.op_type != pattern[0]:
            return False
        required = [p for p in pattern[1:] if not (isinstance(p, str) and p.startswith("?"))]
        if len(node.inputs) < len(required):
            return False
        return all(self.match(n, p, found) for n, p in zip(node.inputs, pattern[1:], strict=False))

    def integers(self, name: str) -> list[int] | None:
        """The value of a constant."""
        return self.constants[name].reshape(-1).tolist() if name in self.constants else None

    def only_maker(self, name: str, op_type: str) -> Node | None:
        """The node that makes `name`, if it is of this type."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == op_type else None


def _rotations(nodes: list[Node], graph: _Graph) -> list[Node]:
    """Interleaved RoPE of x [T, (H,) R], with the casts to and from float32 around it."""
    replaced = {}
    for node in nodes:
        found: dict[str, str] = {}
        if node.op_type != "Reshape" or not graph.match(node.outputs[0], ROTATED, found):
            continue
        ends = [graph.integers(found[k]) for k in ("from_0", "to_1", "from_1", "to_2")]
        pairs = graph.only_maker(found["pairs"], "Reshape")
        if ends != [[0], [1], [1], [2]] or pairs is None:
            continue
        replaced[node.outputs[0]] = (pairs.inputs[0], found["cos"], found["sin"])
    return [_rotation(node, graph, replaced) for node in nodes]


def _rotation(node: Node, graph: _Graph, replaced: dict[str, tuple]) -> Node:
    """`node`, or the rotation that it ends: its final cast where the result is cast, its final reshape where not."""
    source = node.inputs[0] if node.op_type == "Cast" else node.outputs[0]
    if source not in replaced or (node.op_type == "Reshape" and graph.readers[source] == 1 and _is_cast(graph, source)):
        return node
    x, cos, sin = replaced[source]
    before = graph.only_maker(x, "Cast")
    return Node("Rotate", node.name, (before.inputs[0] if before else x, cos, sin), node.outputs)


def _is_cast(graph: _Graph, name: str) -> bool:
    return any(n.op_type == "Cast" and name in n.inputs for n in graph.makers.values())


def _swiglus(nodes: list[Node], graph: _Graph) -> list[Node]:
    """silu(gate) * up."""
    result = []
    for node in nodes:
        found: dict[str, str] = {}
        if node.op_type == "Mul" and graph.match(node.outputs[0], SWIGLU, found):
            node = Node("SwiGlu", node.name, (found["gate"], found["up"]), node.outputs)
        result.append(node)
    return result


def _sum_norms(nodes: list[Node], graph: _Graph) -> list[Node]:
    """The residual sum of two or three terms and its norm; takes the place of the sum."""
    sums: dict[str, Node] = {}
    for node in nodes:
        found = _sum_norm(node, graph)
        if found and found[0] not in sums:
            name, inputs = found
            epsilon = {"epsilon": node.attributes.get("epsilon", 1e-5)}
            sums[name] = Node("SumNorm", node.name, inputs, (name, node.outputs[0]), epsilon)
    normed = {n.outputs[1] for n in sums.values()}
    kept = [n for n in nodes if not (n.op_type == "RMSNormalization" and n.outputs[0] in normed)]
    return [sums.get(n.outputs[0], n) for n in kept]


def _sum_norm(node: Node, graph: _Graph) -> tuple[str, tuple[str, ...]] | None:
    """Name of the sum that `node` norms, and the fused inputs: weight, then the terms."""
    for pattern in SUM_NORM if node.op_type == "RMSNormalization" else ():
        found: dict[str, str] = {}
        if not graph.match(node.outputs[0], pattern, found):
            continue
        inner = graph.makers[node.inputs[0]].inputs[1]
        if "c" in found and graph.readers[inner] > 1:
            continue
        return node.inputs[0], tuple(found[k] for k in ("weight", "a", "b", "c") if k in found)
    return None


def _quantized_rows(nodes: list[Node], graph: _Graph) -> list[Node]:
    """x -> e4m3 rows and their scales; takes the place of the scales, whose later readers are products."""
    fused = {}
    for node in nodes:
        found: dict[str, str] = {}
        if node.op_type != "QuantizeLinear" or not graph.match(node.outputs[0], QUANTIZED_ROWS, found):
            continue
        if not graph.match(found["row"], _ROW, found) or _numbers(graph, found, "one", "largest") != [1.0, 448.0]:
            continue
        smallest = {"smallest": _numbers(graph, found, "smallest")[0]}
        fused[found["row"]] = Node("QuantizeRows", node.name, (found["x"],), (node.outputs[0], found["row"]), smallest)
    quantized = {n.outputs[0] for n in fused.values()}
    return [fused.get(n.outputs[0], n) for n in nodes if n.outputs[0] not in quantized]


def _float8_linears(nodes: list[Node], graph: _Graph) -> list[Node]:
    """The float32 product of e4m3 rows and an e4m3 weight times both scales, where it is rounded to bfloat16 at once."""
    result = []
    for node in nodes:
        found: dict[str, str] = {}
        rounded = node.op_type == "Cast" and node.attributes["to"] == BFLOAT16
        if rounded and graph.match(node.inputs[0], FLOAT8_LINEAR, found) and _numbers(graph, found, "one") == [1.0]:
            inputs = tuple(found[k] for k in ("q", "row", "weight", "channel"))
            node = Node("Float8Linear", node.name, inputs, node.outputs)
        result.append(node)
    return result


def _numbers(graph: _Graph, found: dict[str, str], *names: str) -> list[float]:
    """Values of captured scalar constants; NaN for what is none."""
    values = [graph.constants.get(found[name]) for name in names]
    return [float(v) if v is not None and v.numel() == 1 else float("nan") for v in values]


def _live(nodes: list[Node], outputs: list[str]) -> list[Node]:
    """The nodes that something reads."""
    needed, result = set(outputs), []
    for node in reversed(nodes):
        if needed & set(node.outputs):
            result.append(node)
            needed |= set(node.inputs)
    return result[::-1]
