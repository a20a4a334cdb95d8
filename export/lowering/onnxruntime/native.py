"""The graph once more with own kernels (`latentrt.plugins.cpu`) in the place of ONNX functions and of ONNX Runtime's products.

It goes into the bundle beside the other, which runs anywhere, over the same weights. What is replaced computes the same:
products whose activations are quantized to int8 (accuracy level 4), the products of all heads of an absorbed projection at
once, experts with scales per block, routing, and attention over a plain cache. Weights are read in panels, as they are stored;
the nodes that bring them back into rows for ONNX Runtime go.
"""

from collections import Counter
from collections.abc import Iterator

import onnx
from onnx import helper

from latentrt.plugins.contract import DOMAIN
from latentrt.plugins.onnx_function import MICROSOFT

CPU_DOMAIN = "latentrt.cpu"
INT8_ACTIVATIONS = 4  # accuracy_level of MatMulNBits
PANEL = 16  # outputs
_UINT8 = onnx.TensorProto.UINT8


def with_own_kernels(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy of `model`, whose products are quantized, with own kernels; None where some are left to ONNX Runtime.

    It copies weights into another layout to be fast, while our kernels want them to stay mapped: a session does one or the
    other.
    """
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    replace(copy)
    left = copy.functions or any(n.op_type == "MatMulNBits" for n in copy.graph.node)
    return None if left else copy


def replace(model: onnx.ModelProto) -> int:
    """Rewrites `model`, whose weights may be external, in place; returns how many nodes are ours now."""
    graph = _Graph(model)
    _replace_heads(graph)
    for node in model.graph.node:
        if _quantizes_activations(node, graph):
            weights = [graph.panels(name).name for name in node.input[1:3]]
            _use(node, "Linear", [node.input[0], *weights, *node.input[5:6]], **_sizes(node))
    for op_type, change in (("MlaAttention", _attention), ("MoeRoute", _route), ("MoeExperts", _experts)):
        nodes = [n for n in model.graph.node if (n.domain, n.op_type) == (DOMAIN, op_type)]
        if nodes and all([change(node, graph) for node in nodes]):
            _drop_function(model, op_type)
    _drop_unused(model.graph)
    model.opset_import.append(helper.make_opsetid(CPU_DOMAIN, 1))
    return sum(node.domain == CPU_DOMAIN for node in model.graph.node)


class _Graph:
    """A model's graph and who makes and uses its values."""

    def __init__(self, model: onnx.ModelProto):
        self.graph = model.graph
        self.initializers = {t.name: t for t in model.graph.initializer}
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.uses = Counter(name for node in model.graph.node for name in node.input)
        self.uses.update(o.name for o in model.graph.output)

    def only_user(self, name: str, op_type: str) -> onnx.NodeProto | None:
        """The node of this type that alone uses the value."""
        if self.uses[name] != 1:
            return None
        return next((n for n in self.graph.node if n.op_type == op_type and name in n.input), None)

    def panels(self, name: str) -> onnx.TensorProto | None:
        """The initializer in panels of which the value is the rows."""
        while name in self.makers and self.makers[name].op_type in ("Transpose", "Reshape", "Slice"):
            name = self.makers[name].input[0]
        found = self.initializers.get(name)
        in_panels = found is not None and list(found.dims[-2:] if found.data_type == _UINT8 else found.dims[-1:])
        return found if in_panels in ([PANEL, 4], [PANEL]) else None


def _quantizes_activations(node: onnx.NodeProto, graph: _Graph) -> bool:
    """A product with symmetric weights in panels, and nothing that Linear does not know."""
    if (node.domain, node.op_type) != (MICROSOFT, "MatMulNBits") or _integer(node, "accuracy_level") != INT8_ACTIVATIONS:
        return False
    known = _integer(node, "bits") in (4, 8) and not any(node.input[3:5])
    return known and None not in [graph.panels(name) for name in node.input[1:3]]


def _sizes(node: onnx.NodeProto) -> dict[str, int]:
    return {"bits": _integer(node, "bits"), "outputs": _integer(node, "N")}


def _replace_heads(graph: _Graph) -> None:
    """Transpose, Split, one product a head, Concat, Transpose become one HeadLinear."""
    found = [heads for node in graph.graph.node if node.op_type == "Split" for heads in _heads(node, graph)]
    users = {name: node for node in graph.graph.node if node.op_type == "Concat" for name in node.input}
    for before, products in found:
        after = graph.only_user(users[products[0].output[0]].output[0], "Transpose")
        weights = [_merged([graph.panels(p.input[k]) for p in products]) for k in (1, 2)]
        if after is None or _integers(after, "perm") != [1, 0, 2] or None in weights:
            continue
        _use(after, "HeadLinear", [before.input[0], *(w.name for w in weights)], **_sizes(products[0]))
        graph.graph.initializer.extend(weights)


def _heads(split: onnx.NodeProto, graph: _Graph) -> Iterator[tuple]:
    """(transpose before, products) where a Split along axis 0 feeds one product a head, all of them alike."""
    before = graph.makers.get(split.input[0])
    if before is None or before.op_type != "Transpose" or _integers(before, "perm") != [1, 0, 2]:
        return
    if _integer(split, "axis") != 0 or graph.uses[before.output[0]] != 1:
        return
    products = [graph.only_user(name, "MatMulNBits") for name in split.output]
    if all(p is not None and _quantizes_activations(p, graph) and len(p.input) == 3 for p in products):
        concats = {n.output[0] for p in products for n in [graph.only_user(p.output[0], "Concat")] if n is not None}
        if len(concats) == 1:
            yield before, products


def _merged(parts: list[onnx.TensorProto]) -> onnx.TensorProto | None:
    """One tensor of external ones of one shape that lie one after the other in one file; None if they do not."""
    places = [{e.key: e.value for e in part.external_data} for part in parts]
    if not all(p.get("location") == places[0].get("location") and "offset" in p and "length" in p for p in places):
        return None
    first, size = int(places[0]["offset"]), int(places[0]["length"])
    if [int(p["offset"]) for p in places] != [first + i * size for i in range(len(parts))]:
        return None
    if any(p.dims != parts[0].dims or p.data_type != parts[0].data_type for p in parts):
        return None
    merged = onnx.TensorProto(
        name=parts[0].name.rpartition(".")[0], data_type=parts[0].data_type, dims=[len(parts), *parts[0].dims],
        data_location=onnx.TensorProto.EXTERNAL,
    )  # fmt: skip
    for key, value in {"location": places[0]["location"], "offset": first, "length": size * len(parts)}.items():
        merged.external_data.add(key=key, value=str(value))
    return merged


def _attention(node: onnx.NodeProto, graph: _Graph) -> bool:
    half = _attribute(node, "cache_format") == b"float16"
    node.domain, node.op_type = CPU_DOMAIN, "MlaAttentionHalf" if half else "MlaAttention"
    return True


def _route(node: onnx.NodeProto, graph: _Graph) -> bool:
    if len(node.input) > 2 and node.input[2]:
        return False  # a correction bias
    node.domain = CPU_DOMAIN
    return True


def _experts(node: onnx.NodeProto, graph: _Graph) -> bool:
    """Experts in panels, thus with scales per block; others stay with ONNX Runtime, and so does the function they need."""
    if _attribute(node, "gate_up_layout") != b"interleaved" or len(node.input) != 7:
        return False
    weights = [graph.panels(name) for name in node.input[3:]]
    if None in weights:
        return False
    node.domain, node.op_type = CPU_DOMAIN, "Experts"
    node.input[3:] = [w.name for w in weights]
    node.attribute.append(helper.make_attribute("bits", 8 // (_integer(node, "packed") or 1)))
    return True


def _use(node: onnx.NodeProto, op_type: str, inputs: list[str], **attributes) -> None:
    """Makes another node of a node, which keeps its name and outputs."""
    node.domain, node.op_type = CPU_DOMAIN, op_type
    node.input[:] = inputs
    _assign(node.attribute, [helper.make_attribute(k, v) for k, v in attributes.items()])


def _drop_function(model: onnx.ModelProto, name: str) -> None:
    _assign(model.functions, [f for f in model.functions if (f.domain, f.name) != (DOMAIN, name)])


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Nodes and initializers that no output needs; nodes are in order."""
    needed, kept = {o.name for o in graph.output}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    _assign(graph.node, kept[::-1])
    _assign(graph.initializer, [t for t in graph.initializer if t.name in needed])


def _assign(field, values: list) -> None:
    """Replaces a repeated field of messages, some of which may be its own."""
    copies = [type(v).FromString(v.SerializeToString()) for v in values]
    del field[:]
    field.extend(copies)


def _attribute(node: onnx.NodeProto, name: str):
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


def _integer(node: onnx.NodeProto, name: str) -> int:
    return _attribute(node, name) or 0


def _integers(node: onnx.NodeProto, name: str) -> list[int]:
    return list(_attribute(node, name) or [])
