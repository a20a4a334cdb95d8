"""Groups of nodes that the torch backend runs as one: fewer, larger kernels, since a decode step is made of small ones.

A pattern is (op_type, *patterns of the inputs), or the name of a value to capture; one name captures one value. Inputs
beyond those of a pattern are not looked at. Fused sums and products are float32 inside and rounded once.
"""

from collections.abc import Callable, Iterable
from functools import cache

import torch

from latentrt.plugins import ops
from latentrt.runtime.backends.torch import fused_ops as torch_fused_ops
from latentrt.runtime.backends.torch.ops import Node

Pattern = str | tuple
FLOAT, BFLOAT16 = 1, 16  # ONNX's numbers of the types
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
_QUANTIZED = ("QuantizeLinear", ("Div", _WIDE, "row"), "one")
FLOAT8_LINEAR = (  # "row" is _ROW, or a constant
    "Mul",
    (
        "Mul",
        (
            "Cast",
            ("MatMul", ("DequantizeLinear", _QUANTIZED, "unit"), ("Transpose", ("DequantizeLinear", "weight", "unit"))),
        ),
        "row",
    ),
    "channel",
)
WIDE_LINEAR = ("Gemm", _WIDE, "weight")
PLAIN_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
MATMUL_BY_HEAD = ("Transpose", ("MatMul", ("Transpose", "x"), "weight"))
BY_HEAD = [1, 0, 2]  # perm of its Transposes


def table() -> dict[str, Callable[[Node], Callable]]:
    """Like `torch_ops.TABLE`, for what fusing makes."""
    return {
        "Rotate": lambda node: torch_fused_ops.rotate,
        "SwiGlu": lambda node: torch_fused_ops.swiglu(node.attributes.get("rows")),
        "SumNorm": lambda node: torch_fused_ops.sum_norm(node.attributes["epsilon"], node.attributes.get("rows")),
        "Float8Linear": _float8_linear,
        "Latent": lambda node: torch_fused_ops.latent(node.attributes["epsilon"]),
        "WideLinear": lambda node: torch_fused_ops.wide_linear,
        "MatMulByHead": lambda node: torch_fused_ops.matmul_by_head,
        "RMSNormalization": _rms_norm,
    }


def _float8_linear(node: Node) -> Callable:
    """Of rows and their scales, or of rows that are not quantized yet; see torch_quantizing."""
    quantized = len(node.inputs) == 4
    return torch_fused_ops.float8_product() if quantized else torch_fused_ops.quantizing_linear(**node.attributes)


def _rms_norm(node: Node) -> Callable:
    return torch_fused_ops.rms_norm(node.attributes.get("epsilon", 1e-5), node.attributes.get("rows"))


def fuse(nodes: list[Node], constants: dict[str, torch.Tensor], outputs: list[str]) -> list[Node]:
    """The nodes with every group that a pattern matches replaced by one node, and what nobody reads left out."""
    for rule in (_rotations, _swiglus, _sum_norms, _float8_linears, _latents, _wide_linears, _matmuls_by_head):
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


def _float8_linears(nodes: list[Node], graph: _Graph) -> list[Node]:
    """x, quantized by row or by a constant, times an e4m3 weight and both scales, where it is rounded to bfloat16 at once."""
    result = []
    for node in nodes:
        found: dict[str, str] = {}
        if node.op_type == "Cast" and node.attributes["to"] == BFLOAT16 and graph.match(node.inputs[0], FLOAT8_LINEAR, found):
            scales = _row_scales(graph, found)
            if scales and _numbers(graph, found, "one", "unit") == [1.0, 1.0]:
                inputs = tuple(found[k] for k in ("x", "weight", "channel"))
                node = Node("Float8Linear", node.name, inputs, node.outputs, scales)
        result.append(node)
    return result


def _row_scales(graph: _Graph, found: dict[str, str]) -> dict[str, float]:
    """How the rows of a FLOAT8_LINEAR are scaled, in the words of `torch_fused_ops.quantizing_linear`; empty if otherwise."""
    (static,) = _numbers(graph, found, "row")
    if static == static:
        return {"static": static}
    if graph.match(found["row"], _ROW, found) and _numbers(graph, found, "largest") == [torch_fused_ops.FLOAT8_MAX]:
        return {"smallest": _numbers(graph, found, "smallest")[0]}
    return {}


def _latents(nodes: list[Node], graph: _Graph) -> list[Node]:
    """Both rotations and the norm that make attention's q_pe, latent and k_pe; takes the place of the last of them."""
    order, replaced = {id(n): k for k, n in enumerate(nodes)}, {}
    for node in (n for n in nodes if n.op_type in _attention_ops()):
        kinds = ("Rotate", "RMSNormalization", "Rotate")
        parts = [graph.only_maker(name, kind) for name, kind in zip(node.inputs[1:4], kinds, strict=True)]
        if None in parts or any(graph.readers[p.outputs[0]] > 1 for p in parts):
            continue
        q_pe, latent, k_pe = parts
        angles = [graph.only_maker(name, "Unsqueeze") for name in q_pe.inputs[1:]]
        if [a and a.inputs[0] for a in angles] != list(k_pe.inputs[1:]):
            continue
        inputs = (q_pe.inputs[0], latent.inputs[0], k_pe.inputs[0], latent.inputs[1], *k_pe.inputs[1:])
        epsilon = {"epsilon": latent.attributes.get("epsilon", 1e-5)}
        replaced |= {id(p): None for p in parts}
        last = max(parts, key=lambda p: order[id(p)])
        replaced[id(last)] = Node("Latent", latent.name, inputs, node.inputs[1:4], epsilon)
    return [n for n in (replaced.get(id(n), n) for n in nodes) if n is not None]


@cache
def _attention_ops() -> frozenset[str]:
    """Ops whose inputs 1 to 3 are q_pe, latent and k_pe."""
    taken = ["q_pe", "latent", "k_pe"]
    return frozenset(kind for kind, op in ops.contracts().items() if [i.name for i in op.inputs[1:4]] == taken)


def _wide_linears(nodes: list[Node], graph: _Graph) -> list[Node]:
    """Products in float32 of rows that are cast for them: a router's. A weight that is cast too is taken as it is stored."""
    result = []
    for node in nodes:
        found: dict[str, str] = {}
        matched = node.op_type == "Gemm" and len(node.inputs) == 2 and graph.match(node.outputs[0], WIDE_LINEAR, found)
        plain = PLAIN_GEMM | {"transB": 0} | node.attributes == PLAIN_GEMM
        if matched and plain and graph.makers[node.inputs[0]].attributes["to"] == FLOAT:
            cast = graph.only_maker(found["weight"], "Cast")
            weight = cast.inputs[0] if cast else found["weight"]
            node = Node("WideLinear", node.name, (found["x"], weight), node.outputs)
        result.append(node)
    return result


def _matmuls_by_head(nodes: list[Node], graph: _Graph) -> list[Node]:
    """x [T, H, in] turned, multiplied head by head, and turned back."""
    result = []
    for node in nodes:
        found: dict[str, str] = {}
        if node.op_type == "Transpose" and graph.match(node.outputs[0], MATMUL_BY_HEAD, found):
            inner = graph.makers[graph.makers[node.inputs[0]].inputs[0]]
            if list(node.attributes["perm"]) == list(inner.attributes["perm"]) == BY_HEAD:
                node = Node("MatMulByHead", node.name, (found["x"], found["weight"]), node.outputs)
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
