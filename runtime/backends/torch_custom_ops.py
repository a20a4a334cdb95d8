"""The four latentrt ops for the torch backend: "triton" kernels, or the plain torch "reference"."""

from collections.abc import Callable
from importlib import import_module

import torch

from plugins.mla_attention import op as mla_attention
from plugins.mla_prefill import op as mla_prefill
from plugins.moe_experts import op as moe_experts
from plugins.moe_route import op as moe_route
from runtime.backends.torch_ops import Node

KINDS = ("triton", "reference")
CONTRACTS = {m.CONTRACT.onnx_type: m.CONTRACT for m in (mla_attention, mla_prefill, moe_route, moe_experts)}


def table(kind: str) -> dict[str, Callable[[Node], Callable]]:
    """Like `torch_ops.TABLE`, for the custom ops. ValueError lists the choices."""
    if kind not in KINDS:
        raise ValueError(f"custom ops {kind!r}, accepted: {', '.join(KINDS)}")
    return {name: _maker(contract, _function(contract, kind)) for name, contract in CONTRACTS.items()}


def _function(contract, kind: str) -> Callable:
    name = contract.name + ("_" if contract.aliases else "")
    if kind == "reference":
        return getattr(torch.ops.latentrt, name)
    return getattr(import_module(f"plugins.{contract.name}.kernel"), name)


def _maker(contract, function: Callable) -> Callable[[Node], Callable]:
    names = [spec.name for spec in contract.inputs]
    aliased = [names.index(i) for _, i in contract.aliases]

    def make(node: Node) -> Callable:
        attributes = {a.name: node.attributes[a.name] for a in contract.attributes}
        missing = (None,) * (len(names) - len(node.inputs))

        def call(*tensors):
            result = function(*tensors, *missing, **attributes)
            return (result, *[tensors[i] for i in aliased]) if aliased else result

        return call

    return make
