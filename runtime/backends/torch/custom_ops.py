"""The custom ops for the torch backend: "triton" kernels, or the plain torch "reference"."""

from collections.abc import Callable

import torch

from latentrt.plugins import ops
from latentrt.plugins.contract import OpContract
from latentrt.runtime.backends.torch.ops import Node

KINDS = ("triton", "reference")


def table(kind: str) -> dict[str, Callable[[Node], Callable]]:
    """Like `TABLE` of ops.py beside this file, for the custom ops. ValueError lists the choices."""
    if kind not in KINDS:
        raise ValueError(f"custom ops {kind!r}, accepted: {', '.join(KINDS)}")
    return {name: _maker(contract, _function(contract, kind)) for name, contract in ops.contracts().items()}


def _function(contract: OpContract, kind: str) -> Callable:
    name = contract.name + ("_" if contract.aliases else "")
    if kind == "reference" or contract.collective:
        return getattr(torch.ops.latentrt, name)
    return getattr(ops.part(contract.name, "kernel"), name)


def _maker(contract: OpContract, function: Callable) -> Callable[[Node], Callable]:
    names = [spec.name for spec in contract.inputs]
    aliased = [names.index(i) for _, i in contract.aliases]

    def make(node: Node) -> Callable:
        given = {a.name: node.attributes.get(a.name, a.default) for a in contract.attributes}
        attributes = {a.name: given[a.name] for a in contract.attributes if given[a.name] != a.default}
        missing = (None,) * (len(names) - len(node.inputs))

        def call(*tensors):
            result = function(*tensors, *missing, **attributes)
            return (result, *[tensors[i] for i in aliased]) if aliased else result

        return call

    return make
