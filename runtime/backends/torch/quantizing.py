"""Rows of FP8 products quantized where they are made: by the norm or SwiGLU before, which has the whole row at hand."""

from dataclasses import replace

from latentrt.runtime.backends.torch.ops import Node

_MADE = {"SumNorm": 1, "RMSNormalization": 0, "SwiGlu": 0}  # what makes rows, and which of its outputs they are
_OUTPUTS = {"SumNorm": 2, "RMSNormalization": 1, "SwiGlu": 1}


def quantize(nodes: list[Node]) -> list[Node]:
    """The nodes; makers of an FP8 product's rows have attribute "rows", how these are scaled, and outputs q and row beside
    their own, and the product takes these instead of x."""
    makers = {n.outputs[_MADE[n.op_type]]: n for n in nodes if len(n.outputs) == _OUTPUTS.get(n.op_type)}
    scaled: dict[str, dict] = {}  # rows by name: how the first product that reads them wants them
    for node in nodes:
        if node.op_type == "Float8Linear" and node.inputs[0] in makers:
            scaled.setdefault(node.inputs[0], node.attributes)
    return [_quantized(node, scaled) for node in nodes]


def _quantized(node: Node, scaled: dict[str, dict]) -> Node:
    x = node.outputs[_MADE[node.op_type]] if node.op_type in _MADE else node.inputs[0] if node.inputs else ""
    if x not in scaled:
        return node
    both = (f"{x}.q", f"{x}.row")
    if node.op_type in _MADE:
        return replace(node, outputs=(*node.outputs, *both), attributes=node.attributes | {"rows": scaled[x]})
    if node.op_type == "Float8Linear" and node.attributes == scaled[x]:
        return replace(node, inputs=(*both, *node.inputs[1:]), attributes={})
    return node
