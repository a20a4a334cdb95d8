"""Products of one input with several weights as one product: q_a_proj with kv_a_proj, gate_proj with up_proj.

Small products are launched, not computed, in a decode step. Weights are put one above the other when the graph is compiled.
"""

from collections.abc import Callable, Mapping

import torch

from latentrt.runtime.backends.torch.ops import Node

_SHARED = {"Gemm": 1, "Float8Linear": 1}  # leading inputs that merged products have in common; the rest are stacked


def table() -> dict[str, Callable[[Node], Callable]]:
    """Like `torch_ops.TABLE`, for what merging makes."""
    return {
        "Stack": lambda node: stack,
        "Columns": lambda node: lambda y: y.split(node.attributes["sizes"], -1),
    }


def stack(*weights: torch.Tensor) -> torch.Tensor:
    """Rows of all weights; e4m3 as bytes, since not every PyTorch can put those together."""
    if weights[0].dtype == torch.float8_e4m3fn:
        return torch.cat([w.view(torch.uint8) for w in weights]).view(torch.float8_e4m3fn)
    return torch.cat(weights)


def merge(nodes: list[Node], weights: Mapping[str, torch.Tensor]) -> list[Node]:
    """The nodes, with products merged that share their input and have weights of their own, without bias."""
    groups: dict[tuple, list[Node]] = {}
    for node in nodes:
        if _mergeable(node, weights):
            shared = node.inputs[: _SHARED[node.op_type]]
            groups.setdefault((node.op_type, *shared, repr(node.attributes)), []).append(node)
    replaced: dict[str, list[Node]] = {}
    for group in groups.values():
        if len(group) > 1:
            replaced |= {n.outputs[0]: [] for n in group[1:]}
            replaced[group[0].outputs[0]] = _merged(group, weights)
    return [new for node in nodes for new in replaced.get(node.outputs[0], [node])]


def _mergeable(node: Node, weights: Mapping[str, torch.Tensor]) -> bool:
    own = node.inputs[_SHARED.get(node.op_type, 0) :]
    bias = node.op_type == "Gemm" and (len(own) != 1 or not node.attributes.get("transB"))
    return node.op_type in _SHARED and not bias and all(name in weights for name in own)


def _merged(group: list[Node], weights: Mapping[str, torch.Tensor]) -> list[Node]:
    first, count = group[0], _SHARED[group[0].op_type]
    stacks = [
        Node("Stack", f"{first.name}.stack", parts, (f"{'+'.join(parts)}",))
        for parts in zip(*(n.inputs[count:] for n in group), strict=True)
    ]
    inputs = (*first.inputs[:count], *(s.outputs[0] for s in stacks))
    product = Node(first.op_type, first.name, inputs, (f"{first.outputs[0]}.merged",), first.attributes)
    sizes = [weights[n.inputs[count]].shape[0] for n in group]
    columns = Node(
        "Columns", f"{first.name}.columns", product.outputs, tuple(n.outputs[0] for n in group), {"sizes": sizes}
    )
    return [*stacks, product, columns]
