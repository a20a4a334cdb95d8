"""The graph once more with own kernels (`latentrt.plugins.cpu`) in the place of ONNX functions and of ONNX Runtime's products.

It goes into the bundle beside the other, which runs anywhere, over the same weights. What is replaced computes the same:
products whose activations are quantized to int8 (accuracy level 4), two of the same input in one, a gated MLP's three in one,
experts with scales per block, routing, and all that an attention layer does between its linear products, in either form.
Weights are read in panels, as they are stored; the nodes that bring them back into rows for ONNX Runtime go.

Patterns are those that torch's exporter makes of `export/models`. What does not match one stays, and then there is no graph of
this kind: tests hold that there is.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx
from onnx import helper, numpy_helper

from latentrt.plugins.contract import DOMAIN
from latentrt.plugins.onnx_function import MICROSOFT, set_opset

CPU_DOMAIN = "latentrt.cpu"
INT8_ACTIVATIONS = 4  # accuracy_level of MatMulNBits
PANEL = 16  # outputs
_UINT8, _FLOAT = onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT
_PACKED = "fp8", "int6", "int6r", "int4"
_MLA = {"float32": "Mla", "float16": "MlaHalf", **dict.fromkeys(_PACKED, "MlaPacked")}  # by the cache's format


def with_own_kernels(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy of `model`, whose products are quantized, with own kernels; None where some are left to ONNX Runtime.

    It copies weights into another layout to be fast, while our kernels want them to stay mapped: a session does one or the
    other.
    """
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    replace(copy)
    graph = _Graph(copy)
    left = any(n.op_type == "MatMulNBits" or (n.domain == DOMAIN and not _is_plain(n, graph)) for n in copy.graph.node)
    return None if left else copy


def replace(model: onnx.ModelProto) -> int:
    """Rewrites `model`, whose weights may be external, in place; returns how many nodes are ours now."""
    graph = _Graph(model)
    heads = _head_products(graph)
    for op_type, change in (("MlaAttention", _mla), ("MoeRoute", _route), ("MoeExperts", _experts)):
        nodes = [n for n in model.graph.node if (n.domain, n.op_type) == (DOMAIN, op_type)]
        for node in nodes:
            change(node, graph, heads)
    _assign(model.functions, _called(model))
    set_opset(model, model.functions)
    for node in model.graph.node:
        if _quantizes_activations(node, graph):
            weights = [graph.panels(name).name for name in node.input[1:3]]
            _use(node, "Linear", [node.input[0], *weights, *node.input[5:6]], **_sizes(node))
    for fuse in (_gated_mlp, _add_and_norm, _pair):
        graph = _Graph(model)
        for node in model.graph.node:
            fuse(node, graph)
        _drop_unused(model.graph)
    model.opset_import.append(helper.make_opsetid(CPU_DOMAIN, 1))
    return sum(node.domain == CPU_DOMAIN for node in model.graph.node)


def _called(model: onnx.ModelProto) -> list[onnx.FunctionProto]:
    """Functions that the graph needs; each comes before those that it calls (onnx_function.bodies)."""
    called, kept = {_key(n) for n in _nodes(model.graph.node)}, []
    for function in (f for f in model.functions if (f.domain, f.name, f.overload) in called):
        kept.append(function)
        called |= {_key(n) for n in _nodes(function.node)}
    return kept


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """These, and those of loops and branches."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g.node)


def _key(node: onnx.NodeProto) -> tuple[str, str, str]:
    return node.domain, node.op_type, node.overload


class _OtherPatternError(Exception):
    """A graph is not what a pattern says."""


class _Graph:
    """A model's graph and who makes its values."""

    def __init__(self, model: onnx.ModelProto):
        self.graph = model.graph
        self.initializers = {t.name: t for t in model.graph.initializer}
        self.makers = {name: node for node in model.graph.node for name in node.output}

    def maker(self, name: str, op_type: str) -> onnx.NodeProto:
        """The node of this type that makes the value. Raises _OtherPatternError."""
        node = self.makers.get(name)
        if node is None or node.op_type != op_type:
            raise _OtherPatternError(name, op_type)
        return node

    def users(self, name: str) -> int:
        """How many inputs of nodes the value is."""
        return sum(list(node.input).count(name) for node in self.graph.node)

    def numbers(self, name: str) -> list[int]:
        """What a small initializer holds."""
        return numpy_helper.to_array(self.initializers[name]).flatten().tolist()

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


@dataclass(frozen=True)
class _HeadProducts:
    """The products of all heads of an absorbed projection: Transpose, Split, one product a head, Concat, Transpose."""

    x: str
    y: str
    weights: tuple[str, str]  # values and scales of all heads
    outputs: int


def _head_products(graph: _Graph) -> list[_HeadProducts]:
    """All of 8 bits. Their weights become initializers."""
    found = []
    for after in [n for n in graph.graph.node if n.op_type == "Transpose" and _integers(n, "perm") == [1, 0, 2]]:
        try:
            concat = graph.maker(after.input[0], "Concat")
            products = [graph.maker(name, "MatMulNBits") for name in concat.input]
            split = graph.maker(products[0].input[0], "Split")
            before = graph.maker(split.input[0], "Transpose")
        except _OtherPatternError:
            continue
        alike = all(_quantizes_activations(p, graph) and len(p.input) == 3 and _integer(p, "bits") == 8 for p in products)
        in_order = [p.input[0] for p in products] == list(split.output) and _integer(split, "axis") == 0
        if not alike or not in_order or _integers(before, "perm") != [1, 0, 2]:
            continue
        weights = [_merged([graph.panels(p.input[k]) for p in products]) for k in (1, 2)]
        if None not in weights:
            graph.graph.initializer.extend(weights)
            names = weights[0].name, weights[1].name
            found.append(_HeadProducts(before.input[0], after.output[0], names, _integer(products[0], "N")))
    return found


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


def _mla(node: onnx.NodeProto, graph: _Graph, heads: list[_HeadProducts]) -> bool:
    """MlaAttention and all between it and the linear products before and behind it become one node."""
    q_latent, q_pe, latent, k_pe, *rest = node.input
    cache_format, attended, cache = _attribute(node, "cache_format").decode(), *node.output
    if cache_format not in _MLA:
        return False
    try:
        w_uk = next((found for found in heads if found.y == q_latent), None)
        w_uv = next((found for found in heads if found.x == attended), None)
        if w_uk is None or w_uv is None:
            return False
        q_split, norm = graph.maker(w_uk.x, "Split"), graph.maker(latent, "RMSNormalization")
        kv_split = graph.maker(norm.input[0], "Split")
        q = graph.maker(q_split.input[0], "Reshape").input[0]
        (turned_q, *factors), (turned_k, *same) = _rotated(q_pe, graph), _rotated(k_pe, graph)
    except _OtherPatternError:
        return False
    behind = [n for n in graph.graph.node if w_uv.y in n.input]
    sources = [w_uk.x, turned_q, norm.input[0], turned_k]
    if sources != [*q_split.output, *kv_split.output] or factors != same or [n.op_type for n in behind] != ["Reshape"]:
        return False
    given = {"softmax_scale": _attribute(node, "softmax_scale"), "cache_format": cache_format,
             "epsilon": _attribute(norm, "epsilon"), "v_head_dim": w_uv.outputs, "form": "auto"}  # fmt: skip
    inputs = [q, kv_split.input[0], norm.input[1], *factors, *rest, *w_uk.weights, *w_uv.weights]
    _use(node, _MLA[cache_format], inputs, **given)
    node.output[:] = [behind[0].output[0], cache]
    behind[0].output[0] += ".unused"
    return True


def _rotated(name: str, graph: _Graph) -> tuple[str, str, str]:
    """What is rotated (pairs of neighbours), and the values of the cosines and sines, [T, pairs]. Raises _OtherPatternError."""

    def factor(value: str) -> tuple[str, int] | str:
        """(what is split into pairs, 0 or 1), or a name."""
        maker = graph.makers.get(value)
        if maker is not None and maker.op_type == "Squeeze":
            part = graph.maker(maker.input[0], "Slice")
            return graph.maker(part.input[0], "Reshape").input[0], graph.numbers(part.input[1])[0]
        return maker.input[0] if maker is not None and maker.op_type == "Unsqueeze" else value

    stack = graph.maker(graph.maker(name, "Reshape").input[0], "Concat")
    first, second = (graph.maker(value, "Unsqueeze").input[0] for value in stack.input)
    minus, plus = graph.maker(first, "Sub"), graph.maker(second, "Add")
    terms = [[factor(x) for x in graph.maker(value, "Mul").input] for value in (*minus.input, *plus.input)]
    (even, cos), (odd, sin) = terms[:2]
    if terms[2:] != [[even, sin], [odd, cos]] or even[1:] != (0,) or odd[1:] != (1,) or even[0] != odd[0]:
        raise _OtherPatternError(name)
    return even[0], cos, sin


def _gated_mlp(node: onnx.NodeProto, graph: _Graph) -> None:
    """down(silu(gate) * up), of linear products without bias, becomes one node."""
    try:
        if node.op_type != "Linear" or len(node.input) != 3:
            return
        between = graph.maker(node.input[0], "Mul")
        silu, up = graph.maker(between.input[0], "Mul"), graph.maker(between.input[1], "Linear")
        gate = graph.maker(silu.input[0], "Linear")
        sigmoid = graph.maker(silu.input[1], "Sigmoid")
    except _OtherPatternError:
        return
    alike = gate.input[0] == up.input[0] and len(gate.input) == len(up.input) == 3 and _sizes_of(gate) == _sizes_of(up)
    if alike and sigmoid.input[0] == silu.input[0] and graph.users(between.output[0]) == 1:
        inner, down = _sizes_of(gate), _sizes_of(node)
        given = {"bits": inner["bits"], "inner": inner["outputs"], "down_bits": down["bits"], "outputs": down["outputs"]}
        _use(node, "GatedMlp", [*gate.input, *up.input[1:], *node.input[1:]], **given)


def _pair(node: onnx.NodeProto, graph: _Graph) -> None:
    """Two linear products of the same, without bias, become one node in the place of the first."""
    if node.op_type != "Linear" or len(node.input) != 3:
        return
    alike = [n for n in graph.graph.node if n.op_type == "Linear" and n.input[0] == node.input[0]]
    if len(alike) == 2 and alike[0].output == node.output and len(alike[1].input) == 3 and graph.users(alike[1].output[0]):
        first, second = _sizes_of(node), _sizes_of(alike[1])
        output = alike[1].output[0]
        alike[1].output[0] += ".unused"
        given = first | {"second_bits": second["bits"], "second_outputs": second["outputs"]}
        _use(node, "LinearPair", [*node.input, *alike[1].input[1:]], **given)
        node.output.append(output)


def _add_and_norm(node: onnx.NodeProto, graph: _Graph) -> None:
    """A sum and the norm of it become one node of ONNX Runtime's, in the place of the sum."""
    if node.op_type != "RMSNormalization" or _integer(node, "axis") != -1:
        return
    total = graph.makers.get(node.input[0])
    if total is None or total.op_type != "Add" or not {*total.input} <= {*graph.makers}:
        return  # values between nodes, both [T, hidden_size]
    epsilon, (summed,), (normed,) = _attribute(node, "epsilon"), total.output, node.output
    node.output[0] += ".unused"
    node.input[0] = normed  # no longer of the sum
    _use(total, "SkipSimplifiedLayerNormalization", [*total.input, node.input[1]], epsilon=epsilon)
    total.domain, total.output[:] = MICROSOFT, [normed, "", "", summed]


def _sizes_of(linear: onnx.NodeProto) -> dict[str, int]:
    return {name: _integer(linear, name) for name in ("bits", "outputs")}


def _route(node: onnx.NodeProto, graph: _Graph, heads: list[_HeadProducts]) -> bool:
    if len(node.input) > 2 and node.input[2]:
        return False  # a correction bias
    node.domain = CPU_DOMAIN
    return True


def _experts(node: onnx.NodeProto, graph: _Graph, heads: list[_HeadProducts]) -> bool:
    """Experts in panels, thus with scales per block; others stay with ONNX Runtime, and so does the function they need."""
    if _attribute(node, "gate_up_layout") != b"interleaved" or len(node.input) != 7:
        return False
    weights = [graph.panels(name) for name in node.input[3:]]
    if None in weights:
        return False
    node.domain, node.op_type, node.overload = CPU_DOMAIN, "Experts", ""
    node.input[3:] = [w.name for w in weights]
    node.attribute.append(helper.make_attribute("bits", 8 // (_integer(node, "packed") or 1)))
    return True


def _is_plain(node: onnx.NodeProto, graph: _Graph) -> bool:
    """A custom op whose weights a recipe left in float32."""
    if node.op_type == "MoeExperts":
        return all(graph.initializers[name].data_type == _FLOAT for name in node.input[3:5])
    if node.op_type != "MlaAttention":
        return False
    behind = [n for n in graph.graph.node if node.output[0] in n.input]
    try:
        products = [graph.maker(graph.maker(node.input[0], "Transpose").input[0], "MatMul")]
        products += [n for turned in behind for n in graph.graph.node if turned.output[0] in n.input]
    except _OtherPatternError:
        return False
    return all(n.op_type == "MatMul" and n.input[1] in graph.initializers for n in products)


def _use(node: onnx.NodeProto, op_type: str, inputs: list[str], **attributes) -> None:
    """Makes another node of a node, which keeps its name and outputs."""
    node.domain, node.op_type, node.overload = CPU_DOMAIN, op_type, ""
    node.input[:] = inputs
    _assign(node.attribute, [helper.make_attribute(k, v) for k, v in attributes.items()])


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
